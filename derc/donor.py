"""A donor: how a pretrained network is built, where its weights come from, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc import hub, huggingface
from derc.artifacts import FittedHead, digest
from derc.checkpoints import fingerprint, load_into, load_state_into
from derc.errors import UsageError
from derc.factories import ONNX, first_line, make, naming, onnx_path, source_bytes
from derc.resampling import resampled

if TYPE_CHECKING:
    from torch import Tensor, nn


NOT_IN_DIGEST = ("kwargs", "native", "weights", "drop", "folder", "offline", "head")


def left_out(name: str, why: object) -> str:
    """What the console says of a donor that cannot be used; an error may begin with the donor's name itself."""
    return f"donor {name} is left out: {str(why).removeprefix(f'donor {name} ')}"


@dataclass(frozen=True)
class Donor:
    """A pretrained network; `factory` is a library's, ``timm:NAME``, or ``package.module:function``, or ``onnx:FILE``.

    The factory is called with `kwargs`. `input_size` is (C, H, W); images in [0, 1] are normalised with `mean` and
    `std` per channel. `labels` are the class names in output order, None where unknown. `weights` is a checkpoint,
    whose entries that begin with one of `drop` are left out. `pretrained` takes the weights that the library
    publishes, for transformers those of the hub's `repository`; where `offline`, from the local cache alone. `folder`
    is where the user's package may lie. Without weights the network is what its factory makes under a fixed seed.
    Where the network was rebuilt for another input size, `native` is what the weights' own network is called with.
    A fitted `head` takes the place of the network's last linear map; `labels` are then those that it was fitted to.
    """

    name: str
    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    native: Mapping[str, Any] | None = None
    weights: Path | None = None
    drop: tuple[str, ...] = ()
    pretrained: bool = False
    repository: str = ""
    input_size: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    labels: tuple[str, ...] | None = None
    licence: str = "unknown"
    source: str = ""
    folder: Path | None = None
    offline: bool = False
    head: FittedHead | None = None

    def build(self) -> nn.Module:
        """A fresh copy in eval mode, float32, with its weights.

        Raises UsageError where factory or weights are wrong, MissingDependencyError where the hub cannot be reached.
        """
        return self._built()[0]

    def _built(self) -> tuple[nn.Module, str]:
        """The network, and what is to be said of its weights."""
        kwargs, remark = self.kwargs if self.native is None else self.native, ""
        if self._library[0] == ONNX:
            kwargs = {**kwargs, "input_size": self.input_size}
        module = make(self.name, self.factory, kwargs, self.folder)
        if self._library[0] == ONNX:
            from derc.onnxdonor.network import remark_of

            remark = remark_of(module)
        with naming(self.name):
            if self.weights is not None:
                remark = load_into(module, self.weights, self.drop, lambda state: self._rename(state, kwargs))
            elif self.pretrained:
                load_state_into(module, self._hub_state(kwargs), self.source or self.factory)
        if self.native is not None:
            module = self._resized(module)
        if self.head is not None:
            from derc import lastlayer

            lastlayer.replace(module, self.head)
        return module.float().eval(), remark

    def _resized(self, native: nn.Module) -> nn.Module:
        """The network for its input size, with the weights of `native`, which is for another."""
        module = make(self.name, self.factory, self.kwargs, self.folder)
        with naming(self.name):
            load_state_into(module, resampled(self.factory, self.kwargs, native, module), self.factory)
        return module

    def check(self) -> str:
        """Build and run it once; returns what is to be said of its weights, and raises as `check_output` does."""
        module, remark = self._built()
        self.check_output(module)
        return remark

    def check_output(self, module: nn.Module) -> None:
        """Raise UsageError unless `module` takes the donor's input size and gives one logit per label."""
        import torch

        try:
            with torch.no_grad():
                output = module(torch.zeros(1, *self.input_size))
        except Exception as error:  # a network of any origin may raise anything
            raise UsageError(
                f"donor {self.name} does not run at input size {self.input_size}: {first_line(error)}"
            ) from error
        if not isinstance(output, torch.Tensor) or output.dim() != 2:
            what = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
            raise UsageError(
                f"donor {self.name} gives {what}, not logits (N, classes): use its form for classification"
            )
        if self.labels is not None and len(self.labels) != output.shape[1]:
            raise UsageError(f"donor {self.name} has {output.shape[1]} outputs but {len(self.labels)} labels")

    def digest(self) -> str:
        """SHA-256 of all fields, with a file's bytes in place of its path, and of the factory's source."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_IN_DIGEST}
        made: list[Any] = [dict(self.kwargs), dict(self.native or {}), list(self.drop), source_bytes(self.factory)]
        made += [self.head] if self.head is not None else []
        if self.weights is not None:
            return digest(plain, *made, fingerprint(self.weights))
        if self._library[0] == ONNX:
            return digest(plain, *made, self._file_fingerprint())
        return digest(plain, *made, {name: value.numpy() for name, value in self.build().state_dict().items()})

    def _file_fingerprint(self) -> str:
        """SHA-256 of the ONNX file that is the network."""
        from derc.onnxdonor import file

        with naming(self.name):
            return file.fingerprint(onnx_path(self.factory, self.folder))

    @property
    def _library(self) -> tuple[str, str]:
        library, _, name = self.factory.partition(":")
        return library, name

    def _rename(self, state: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """`state` under the names of this library's version."""
        library, name = self._library
        return huggingface.renamed(name, kwargs, state) if library == "transformers" else state

    def _hub_state(self, kwargs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The weights that the library publishes."""
        library, name = self._library
        match library:
            case "timm":
                return hub.timm_state(name, kwargs, self.offline)
            case "torchvision":
                return hub.torchvision_state(name, self.offline)
            case "transformers":
                return self._rename(hub.repository_state(self.repository, self.offline), kwargs)
        raise UsageError(f"nobody publishes weights of {self.factory}: give them as a file")
