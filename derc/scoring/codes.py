"""NASWOT: how differently a network's activation functions switch for different images (Mellor et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from derc.artifacts import Array
from derc.data import Split
from derc.scoring.evidence import Evidence, Subject, squash
from derc.scoring.untouched import lent

ACTIVATIONS = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.silu.default,
    torch.ops.aten.silu_.default,
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardswish_.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.clamp.default,
}


@dataclass(frozen=True)
class Naswot:
    """Mean of log|K_H| over batches of probe images; forward passes alone (Mellor et al. 2021, eq. 2)."""

    images: int = 96
    batch: int = 32
    name: ClassVar[str] = "naswot"
    needs: ClassVar[frozenset[str]] = frozenset()
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        return naswot(subject.network, evidence.probe, self.images, self.batch)

    def share(self, value: float) -> float:
        """Around a half where log|K_H| is ten for each image."""
        return squash(value, 10.0 * self.batch)


class Codes(TorchDispatchMode):
    """Collects, for each activation function that runs, which of its inputs are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in ACTIVATIONS and args[0].dim() > 1:
            self.codes.append((args[0] > 0).flatten(1))
        return func(*args, **(kwargs or {}))


def naswot(network: nn.Module, probe: Split, images: int, batch: int) -> float:
    """Mean of log|K_H| over batches, K_H the Hamming kernel of activation codes (Mellor et al. 2021, eq. 2).

    0 where no batch is full or nothing is activated, -inf where two images have the same code.
    """
    values = []
    with lent(network):
        for number, (x, _) in enumerate(probe.batches(batch)):
            if number * batch >= images or len(x) < batch:
                break
            with Codes() as seen:
                network(x)
            values.append(log_determinant([code for code in seen.codes if len(code) == len(x)]))
    return float(np.mean(values)) if values else 0.0


def log_determinant(codes: list[torch.Tensor]) -> float:
    """log|K| of K = Σ c cᵀ + (1 - c)(1 - c)ᵀ over binary codes (n, units); 0 without codes."""
    if not codes:
        return 0.0
    return float(np.linalg.slogdet(kernel(codes, len(codes[0])))[1])


@torch.no_grad()
def block_kernels(blocks: Sequence[nn.Module], probe: Split, options: Naswot) -> list[list[Array]]:
    """For each of a donor's `blocks` in order, K_H of its activations within the donor, by batch: (n, n) float64."""
    found: list[list[Array]] = [[] for _ in blocks]
    for number, (x, _) in enumerate(probe.batches(options.batch)):
        if number * options.batch >= options.images or len(x) < options.batch:
            break
        for kernels, block in zip(found, blocks, strict=True):
            with Codes() as seen:
                x = block(x.clone())
            kernels.append(kernel([code for code in seen.codes if len(code) == len(x)], len(x)))
    return found


def kernel(codes: list[torch.Tensor], count: int) -> Array:
    """K = Σ c cᵀ + (1 - c)(1 - c)ᵀ over binary codes (count, units), float64."""
    total = torch.zeros(count, count, dtype=torch.float64)
    for code in codes:
        c = code.float()
        total += (c @ c.T + (1 - c) @ (1 - c).T).double()
    return total.numpy()


def linear_parts(kernels: Sequence[Sequence[Array]], places: Sequence[int], options: Naswot) -> list[float]:
    """What each block adds to NASWOT's share of a network that has one block at each of `places`, to first order.

    log|M + D| ≈ log|M| + tr(M⁻¹ D) around the kernel M of the mean network. The mean over batches; 0 for all where M is
    singular, as where nothing is activated.
    """
    parts, slopes = np.zeros(len(kernels)), list[float]()
    for batch in zip(*kernels, strict=True):
        by_place = {place: [one for one, at in zip(batch, places, strict=True) if at == place] for place in places}
        mean = np.sum([np.mean(ones, axis=0) for ones in by_place.values()], axis=0)
        sign, value = np.linalg.slogdet(mean)
        if sign <= 0:
            return [0.0] * len(kernels)
        inverse = np.linalg.inv(mean)
        parts += [float((inverse * one).sum()) for one in batch]
        slopes.append(options.share(value + 0.5) - options.share(value - 0.5))
    return [float(part * np.mean(slopes) / max(len(slopes), 1)) for part in parts]
