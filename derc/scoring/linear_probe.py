"""A linear probe: what the features before the classifier tell of the classes, by ridge regression in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from derc.artifacts import Array
from derc.data import Split
from derc.errors import DercError
from derc.scoring.evidence import ANSWERS, Evidence, Subject
from derc.scoring.untouched import lent

STRENGTHS = tuple(10.0**power for power in range(-6, 3))
"""Penalties tried, as shares of the mean squared singular value."""
OPERAND = {
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.convolution.default: 0,
}
"""Which argument of each kind of map is the value that it maps."""


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy on the validation images of a ridge classifier on frozen features, fitted to the probe images.

    The features are what goes into the network's last map, averaged over positions. The penalty is the one with the
    least squared error when each probe image is left out in turn, which has a closed form (Allen 1974). Without labels
    both splits are answered by the task donors' mean prediction. One forward pass over both splits, one singular value
    decomposition (Alain and Bengio 2017 for the idea).
    """

    name: ClassVar[str] = "linear_probe"
    needs: ClassVar[frozenset[str]] = frozenset({ANSWERS})
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        seen, wanted = evidence.asked(), evidence.validation_answers
        targets = np.eye(int(max(seen.max(), wanted.max())) + 1)[seen]
        weight, bias = ridge(features(subject.network, evidence.probe), targets)
        answers = (features(subject.network, evidence.validation) @ weight + bias).argmax(1)
        return float((answers == wanted).mean())

    def share(self, value: float) -> float:
        return value


def ridge(x: Array, y: Array) -> tuple[Array, Array]:
    """Weight (d, q) and bias (q,) for features x (n, d) and targets y (n, q); the bias is not penalised.

    Raises DercError where features are not finite.
    """
    if not np.isfinite(x).all():
        raise DercError("the network's last features are not finite: leave out the donor that gives them")
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, s, vt = np.linalg.svd(x - mean_x, full_matrices=False)
    projected = u.T @ (y - mean_y)
    scale = max(float((s**2).mean()), 1e-300)
    _, strength = min((left_out(u, s, projected, y - mean_y, a * scale), a * scale) for a in STRENGTHS)
    weight: Array = vt.T @ ((s / (s**2 + strength))[:, None] * projected)
    return weight, mean_y - mean_x @ weight


def left_out(u: Array, s: Array, projected: Array, y: Array, strength: float) -> float:
    """Mean squared error for each row when that row is left out: residual / (1 − leverage) (Allen 1974)."""
    shrink = s**2 / (s**2 + strength)
    residual = y - u @ (shrink[:, None] * projected)
    leverage = (u**2 @ shrink) + 1 / len(y)
    return float(np.mean((residual / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2))


def features(network: nn.Module, split: Split, batch: int = 64) -> Array:
    """(n, d) float64: what goes into the last map of `network`, its mean over positions.

    Raises DercError where the network has no convolution and no linear map.
    """
    rows = []
    with lent(network):
        for x, _ in split.batches(batch):
            with Last() as last:
                network(x)
            rows.append(last.features(len(x)))
    found: Array = torch.cat(rows).double().numpy()
    return found


class Last(TorchDispatchMode):
    """Remembers what the last convolution or matrix product was given."""

    def __init__(self) -> None:
        super().__init__()
        self.operand: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in OPERAND:
            self.operand = args[OPERAND[func]]
        return func(*args, **(kwargs or {}))

    def features(self, images: int) -> torch.Tensor:
        """(images, d) of what was remembered: maps (N, C, …) or rows (N · positions, C)."""
        value = self.operand
        if value is None or value.shape[0] % images:
            raise DercError("the network ends in no linear map, so it has no features for a linear probe")
        if value.dim() > 2:
            return value.flatten(2).mean(2)
        return value.reshape(images, -1, value.shape[1]).mean(1)
