"""Random values of every layout, and what a stitch between two of them should give, position by position."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import floor

import numpy as np
import torch
from hypothesis import strategies as st

from derc import stitching
from derc.ir import Layout, TensorType
from derc.modules import Stitch

LAYOUTS = ("NCHW", "NHWC", "NLC", "NLC of an unknown grid", "NC")
PAIRS = list(product(LAYOUTS, LAYOUTS))


@st.composite
def kinds(draw, layout: str) -> TensorType:
    """A type of the layout with up to five channels, prefix tokens and 9 × 9 positions, aspect and size at random."""
    channels, height, width, prefix = (draw(st.integers(low, high)) for low, high in ((1, 5), (1, 9), (1, 9), (0, 5)))
    match layout:
        case "NCHW":
            return TensorType((channels, height, width), Layout.NCHW)
        case "NHWC":
            return TensorType((height, width, channels), Layout.NHWC)
        case "NLC":
            return TensorType((prefix + height * width, channels), Layout.NLC, prefix=prefix, grid=(height, width))
        case "NC":
            return TensorType((channels,), Layout.NC)
        case _:
            return TensorType((prefix + draw(st.integers(1, 40)), channels), Layout.NLC, prefix=prefix)


def random_value(kind: TensorType, seed: int, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, *kind.shape)))


def build(source: TensorType, target: TensorType, seed: int = 0) -> Stitch:
    """A stitch made in float64, so that its averages are not rounded to float32."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        return stitching.build(source, target)
    finally:
        torch.set_default_dtype(torch.float32)


def resampled(before: int, after: int) -> np.ndarray:
    """(after, before) weights: the mean over what a position covers, or between the two nearest centres."""
    weights = np.zeros((after, before))
    step = Fraction(before, after)
    for new in range(after):
        if step >= 1:
            for old in range(before):
                overlap = min((new + 1) * step, old + 1) - max(new * step, old)
                weights[new, old] = max(overlap, 0) / step
        else:
            centre = min(max((new + Fraction(1, 2)) * step - Fraction(1, 2), Fraction(0)), Fraction(before - 1))
            low = floor(centre)
            weights[new, low] += float(1 - (centre - low))
            weights[new, min(low + 1, before - 1)] += float(centre - low)
    return weights


def positions(kind: TensorType, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, positions, C) row by row, and (N, prefix, C)."""
    if kind.layout is Layout.NCHW:
        value = np.moveaxis(value, 1, 3)
    if kind.layout is Layout.NC:
        value = value[:, None]
    tokens = value.reshape(len(value), -1, kind.channels)
    return tokens[:, kind.prefix :], tokens[:, : kind.prefix]


def between(source: TensorType, target: TensorType, before: int, after: int) -> np.ndarray:
    """(after, before) weights of all positions; both axes apart where both are known."""
    if source.spatial and target.spatial:
        (height, width), (rows, columns) = source.spatial, target.spatial
        return np.kron(resampled(height, rows), resampled(width, columns))
    return resampled(before, after)


def expected(stitch: Stitch, source: TensorType, target: TensorType, value: torch.Tensor) -> np.ndarray:
    """What `stitch` should give for `value`: (N, *target.shape)."""
    weight, bias = stitch.linear.weight.detach().numpy(), stitch.linear.bias.detach().numpy()
    old, prefix = positions(source, value.numpy())
    count = 1 if target.layout is Layout.NC else target.numel // target.channels - target.prefix
    mixed = np.einsum("qp,npc->nqc", between(source, target, old.shape[1], count), old)
    new = np.einsum("dc,nqc->nqd", weight, mixed) + bias
    if target.prefix:
        given = np.concatenate([old.mean(1, keepdims=True), prefix], 1).reshape(len(old), -1)
        first = given @ stitch.prefix.weight.detach().numpy().T + stitch.prefix.bias.detach().numpy()
        new = np.concatenate([first.reshape(len(old), target.prefix, target.channels), new], 1)
    if target.layout is Layout.NCHW:
        return np.moveaxis(new, 2, 1).reshape(len(old), *target.shape)
    return new.reshape(len(old), *target.shape)
