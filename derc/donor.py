"""A donor: how a pretrained network is built, where its weights come from, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc.artifacts import digest
from derc.checkpoints import load_into, load_state_into, read_bytes
from derc.errors import MissingDependencyError, UsageError
from derc.factories import first_line, make, source_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Donor:
    """A pretrained network; `factory` is ``timm:NAME`` or ``package.module:function``, called with `kwargs`.

    `input_size` is (C, H, W); images in [0, 1] are normalised with `mean` and `std` per channel. `labels` are the class
    names in output order, None where unknown. `pretrained` takes timm's hub weights. `folder` is where the user's
    package may lie. Without weights the network is what its factory makes under a fixed seed.
    """

    name: str
    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    pretrained: bool = False
    input_size: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    labels: tuple[str, ...] | None = None
    licence: str = "unknown"
    source: str = ""
    folder: Path | None = None

    def build(self) -> nn.Module:
        """A fresh copy in eval mode, float32, with its weights.

        Raises UsageError where factory or weights are wrong, MissingDependencyError where timm's hub cannot be reached.
        """
        module = make(self.name, self.factory, self.kwargs, self.folder)
        if self.weights is not None:
            load_into(module, self.weights)
        elif self.pretrained:
            load_state_into(module, self._hub_state, self.source or self.factory)
        return module.float().eval()

    def check(self) -> None:
        """Raise UsageError unless the network takes its input size and gives one logit per label."""
        import torch

        module = self.build()
        try:
            with torch.no_grad():
                output = module(torch.zeros(1, *self.input_size))
        except Exception as error:  # a network of any origin may raise anything
            raise UsageError(
                f"donor {self.name} does not run at its input size {self.input_size}: {first_line(error)}"
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
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kwargs", "weights", "folder")}
        if self.weights is not None:
            return digest(plain, dict(self.kwargs), read_bytes(self.weights), source_bytes(self.factory))
        state = {name: value.numpy() for name, value in self.build().state_dict().items()}
        return digest(plain, dict(self.kwargs), state, source_bytes(self.factory))

    @cached_property
    def _hub_state(self) -> dict[str, Tensor]:
        import timm

        name = self.factory.removeprefix("timm:")
        try:
            module: nn.Module = timm.create_model(name, pretrained=True, **self.kwargs)
        except Exception as error:  # hub clients raise errors of several libraries
            raise MissingDependencyError(
                f"the pretrained weights of {name} cannot be had ({first_line(error)}): connect to the hub, or give "
                "the weights as a file with --checkpoint (in a zoo file: weights)"
            ) from error
        return dict(module.state_dict())
