"""transformers' image networks as donors: a class and its config in, a module that gives one tensor out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from derc.errors import MissingDependencyError, UsageError, suggest

if TYPE_CHECKING:
    from torch import Tensor, nn

ENDINGS = ("ForImageClassification", "ForImageClassificationWithTeacher", "Model")
MORE_OPTIONS = ("num_labels", "attn_implementation")
"""What a config takes besides its fields."""


def find(name: str) -> Callable[..., Any]:
    """What builds the class `name`, called with the fields of its config.

    Raises UsageError where there is no such image network, MissingDependencyError without transformers.
    """
    kind = network_class(name)

    def create(**kwargs: Any) -> Any:
        fields, arguments = _split(kind, kwargs)
        return tensor_form(kind)(config_of(kind, fields), **arguments)

    return create


def network_class(name: str) -> Any:
    """The class `name` of transformers that takes images; raises UsageError where there is none."""
    transformers = library()
    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        known = [entry for entry in dir(transformers) if entry.endswith(ENDINGS)]
        raise UsageError(f"transformers has no network {name!r}{suggest(name, known)}")
    if getattr(kind, "main_input_name", "") != "pixel_values":
        raise UsageError(f"transformers' {name} does not take images: name one that does, …ForImageClassification")
    return kind


def library() -> Any:
    """The package transformers; raises MissingDependencyError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError('transformers is not installed: pip install "derc[hf]"') from error
    return transformers


def _split(kind: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the config, and arguments of the class itself such as `add_pooling_layer`."""
    own = set(inspect.signature(kind.__init__).parameters) - {"self", "config"}
    fields = {key: value for key, value in kwargs.items() if key not in own}
    return fields, {key: value for key, value in kwargs.items() if key in own}


def config_of(kind: Any, fields: Mapping[str, Any]) -> Any:
    """The config of `kind` with these fields; raises UsageError for a field that it does not have."""
    known = {key for key in dir(kind.config_class()) if not key.startswith("_")} | set(MORE_OPTIONS)
    for key in fields:
        if key not in known:
            raise UsageError(f"{kind.config_class.__name__} has no field {key!r}{suggest(key, known)}")
    return kind.config_class(**fields)


@cache
def tensor_form(kind: Any) -> Any:
    """`kind` with a forward pass from images to one tensor: logits, else pooled features (N, C).

    A subclass and not a wrapper, so that submodules keep the paths that they have in the printed network.
    """

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return single(kind.forward(self, x))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def single(output: Any) -> Tensor:
    """Logits where there are any, else pooled features, else the last hidden state's mean over positions."""
    for name in ("logits", "pooler_output"):
        found: Tensor | None = getattr(output, name, None)
        if found is not None:
            return found.flatten(1)
    hidden: Tensor = output.last_hidden_state
    return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)


def image_size(module: Any) -> tuple[int, int]:
    """(H, W) that the network's config is for."""
    size = module.config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def source(name: str, kwargs: Mapping[str, Any]) -> str:
    """The expression that builds the network, given `import transformers`."""
    kind = network_class(name)
    fields, arguments = ([f"{key}={value!r}" for key, value in part.items()] for part in _split(kind, kwargs))
    config = f"transformers.{kind.config_class.__name__}({', '.join(fields)})"
    return f"transformers.{name}({', '.join([config, *arguments])})"


def renamed(name: str, kwargs: Mapping[str, Any], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` under the names of this version of transformers, by its own rules for older checkpoints."""
    import torch

    kind = network_class(name)
    fields, arguments = _split(kind, kwargs)
    with quiet():
        module, told = kind.from_pretrained(
            None,
            config=config_of(kind, fields),
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **arguments,
        )
    other = {entry[0]: torch.empty(entry[1], device="meta") for entry in told["mismatched_keys"]}
    known = {key: value for key, value in module.state_dict().items() if key not in told["missing_keys"]}
    return known | other | {key: state[key] for key in told["unexpected_keys"] if key in state}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the console while the body runs."""
    reports = library().utils.logging
    before, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(before)
        if bars:
            reports.enable_progress_bar()
