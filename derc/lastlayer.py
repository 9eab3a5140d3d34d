"""The last linear map of a live network: where it is, what goes into it, and another one in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from derc.artifacts import FittedHead
from derc.errors import UsageError
from derc.lowered import Lowered
from derc.mode import in_eval

CLOSE = 1e-4
"""How far the outputs may be from the map of the mean features, as a share of the largest (at least 1)."""


@torch.no_grad()
def find(lowered: Lowered, images: torch.Tensor) -> str | None:
    """Path of the module that gives the outputs as a linear map of features, averaged over positions if there are any.

    It is a Linear, or a convolution of 1 × 1. None where `images` (n, C, H, W) show that there is no such module.
    Raises UsageError where the outputs are not finite.
    """
    paths = {part: path for path, part in lowered.module.named_modules() if _maps(part)}
    called: list[nn.Module] = []
    handles = [part.register_forward_pre_hook(lambda one, _: called.append(one)) for part in paths]
    with in_eval(lowered.program):
        outputs = lowered.program(images.clone())
    for handle in handles:
        handle.remove()
    if not torch.isfinite(outputs).all():
        raise UsageError(f"donor {lowered.graph.name} gives NaN or infinity: check its weights, or leave it out")
    if not called or called.count(called[-1]) != 1:
        return None
    last = called[-1]
    with in_eval(lowered.program), tapped(last) as inputs:
        lowered.program(images.clone())
    mapped = nn.functional.linear(pooled(inputs[0], last), last.weight.flatten(1), last.bias)  # type: ignore[arg-type, operator]
    if outputs.shape != mapped.shape:
        return None
    allowed = CLOSE * max(1.0, float(outputs.abs().max()))
    return paths[last] if float((outputs - mapped).abs().max()) <= allowed else None


def _maps(module: object) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


@contextmanager
def tapped(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What goes into `module` at each call inside, in order, with its gradient where there is one."""
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def pooled(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The input (n, …) of a last map as (n, features): its mean over positions."""
    if isinstance(module, nn.Conv2d):
        return x.mean((2, 3))
    return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


def width(module: nn.Module) -> int:
    """How many features a last map takes."""
    size: int = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features  # type: ignore[assignment]
    return size


def made(old: nn.Module, head: FittedHead) -> nn.Module:
    """A module of the kind of `old`, a Linear or a convolution of 1 × 1, that computes `head`."""
    classes, features = head.weight.shape
    new = nn.Conv2d(features, classes, 1) if isinstance(old, nn.Conv2d) else nn.Linear(features, classes)
    with torch.no_grad():
        new.weight.copy_(torch.from_numpy(head.weight.copy()).reshape(new.weight.shape))
        new.bias.copy_(torch.from_numpy(head.bias.copy()))  # type: ignore[union-attr]
    return new.train(old.training)


def replace(module: nn.Module, head: FittedHead) -> None:
    """Put `head` in its place in `module`; what leads there is copied first, so that nobody else's changes."""
    *above, name = head.path.split(".")
    for part in above:
        inner = copy.copy(module.get_submodule(part))
        inner._modules = dict(inner._modules)
        module._modules[part] = inner
        module = inner
    module._modules[name] = made(module.get_submodule(name), head)
