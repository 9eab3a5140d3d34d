"""What of a network trains: everything, what derc added, or the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from derc.errors import UsageError, suggest
from derc.mode import in_eval

RATES = {"none": 1e-3, "blocks": 1e-2, "all-but-head": 1e-2}
"""What may be frozen, and the learning rate that suits what is left (docs/finetune.md)."""
FREEZE = tuple(RATES)
Trains = Callable[[str], bool]
"""Whether the module or parameter of this path in a network trains."""


@dataclass(frozen=True)
class Freeze:
    """`none` trains everything, `blocks` what lies outside `block0`, `block1` …, `all-but-head` what is under `head`.

    The names are those of an emitted model.py; `head` is its last layer, None where there is none.
    """

    kind: str = "none"
    head: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in FREEZE:
            known = ", ".join(FREEZE)
            raise UsageError(f"--freeze {self.kind!r} is unknown, known: {known}{suggest(self.kind, FREEZE)}")
        if self.kind == "all-but-head" and self.head is None:
            raise UsageError("this network does not end in a linear layer, so --freeze all-but-head leaves nothing")

    def __call__(self, path: str) -> bool:
        if self.kind == "blocks":
            return not path.startswith("block")
        if self.kind == "all-but-head":
            return path == self.head or path.startswith(f"{self.head}.")
        return True


@torch.no_grad()
def last_layer(network: nn.Module, image: Tensor) -> str | None:
    """Path of the linear layer or convolution that gives the network's outputs for an `image` (1, C, H, W), if any."""
    found: list[tuple[str, Tensor]] = []
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [m.register_forward_hook(lambda _m, _x, y, n=n: found.append((n, y))) for n, m in layers]
    try:
        with in_eval(network):
            outputs = network(image)
    finally:
        for hook in hooks:
            hook.remove()
    same = [
        name for name, value in found if value.numel() == outputs.numel() and torch.equal(value.flatten(), outputs[0])
    ]
    return same[-1] if same else None


def everything(_: str) -> bool:
    """Every module and parameter trains."""
    return True


def prepare(network: nn.Module, trains: Trains) -> list[nn.Parameter]:
    """Let only what `trains` require gradients; returns those parameters, raises UsageError where there are none."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trains(name) and parameter.is_floating_point())
    found = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not found:
        raise UsageError(
            "nothing is left to train: this network has no stitch, stem or head of derc's own; "
            "give --freeze all-but-head or none"
        )
    return found


def to_train(network: nn.Module, trains: Trains, norms: str) -> None:
    """Training mode for what trains, eval mode for the rest, and for every batch norm where `norms` is fixed."""
    for name, module in network.named_modules():
        fixed = norms == "fixed" and isinstance(module, _BatchNorm)
        module.training = trains(name) and not fixed
