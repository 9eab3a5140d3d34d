"""Random values of every layout, and what a stitch between two of them should give, position by position."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import floor

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from derc import stitching
from derc.ir import Layout, TensorType
from derc.modules import Stitch
from derc.stitching import MAPS, PLAIN, REGRIDS, Form

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


@st.composite
def formed(draw, before: str, after: str, maps: tuple[str, ...] = MAPS) -> tuple[TensorType, TensorType, Form]:
    """Two types of these layouts and any form, of these `maps`, that a stitch between them may have."""
    source, target = draw(kinds(before)), draw(kinds(after))
    mapped = draw(st.sampled_from(maps))
    if mapped != "full":
        target = with_channels(target, source.channels)
    if mapped != "full" and target.prefix:
        prefix = source.prefix if source.layout is Layout.NLC else 0
        target = replace(target, shape=(target.shape[0] - target.prefix + prefix, target.channels), prefix=prefix)
    if source.layout is target.layout and draw(st.integers(0, 3)) == 0:
        target = source
    ranks = (0, 1, 2, 3) if mapped == "full" else (0,)
    every = [Form(regrid, mapped, rank) for regrid in REGRIDS for rank in ranks]
    return source, target, draw(st.sampled_from([f for f in every if not stitching.obstacle(source, target, f)]))


def with_channels(kind: TensorType, channels: int) -> TensorType:
    first = kind.layout is Layout.NCHW
    return replace(kind, shape=(channels, *kind.shape[1:]) if first else (*kind.shape[:-1], channels))


def build(source: TensorType, target: TensorType, seed: int = 0, form: Form = PLAIN) -> Stitch:
    """A stitch made in float64, so that its averages are not rounded to float32; scales and shifts at random."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        stitch = stitching.build(source, target, form)
        for weights in (stitch.scale, stitch.shift):
            if weights is not None:
                nn.init.normal_(weights)
        return stitch
    finally:
        torch.set_default_dtype(torch.float32)


def resampled(before: int, after: int, regrid: str = "mean") -> np.ndarray:
    """(after, before) weights: the mean over what a position covers, or between the two nearest centres."""
    weights = np.zeros((after, before))
    step = Fraction(before, after)
    for new in range(after):
        if step > 1 and regrid == "strided":
            weights[new, new * before // after] = 1
        elif step >= 1 and not (step > 1 and regrid == "bilinear"):
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


def between(source: TensorType, target: TensorType, before: int, after: int, regrid: str = "mean") -> np.ndarray:
    """(after, before) weights of all positions; both axes apart where both are known."""
    if source.spatial and target.spatial:
        (height, width), (rows, columns) = source.spatial, target.spatial
        return np.kron(resampled(height, rows, regrid), resampled(width, columns, regrid))
    return resampled(before, after, regrid)


def channel_map(stitch: Stitch, form: Form, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What a stitch does to the channels of a position, as a matrix and what is added."""
    if form.map == "identity":
        return np.eye(width), np.zeros(width)
    if form.map == "affine":
        return np.diag(stitch.scale[-1].detach().numpy()), stitch.shift[-1].detach().numpy()
    weight = stitch.linear.weight.detach().numpy()
    weight = weight @ stitch.inner.weight.detach().numpy() if form.rank else weight
    return weight, stitch.linear.bias.detach().numpy()


def expected(
    stitch: Stitch, source: TensorType, target: TensorType, value: torch.Tensor, form: Form = PLAIN
) -> np.ndarray:
    """What `stitch` should give for `value`: (N, *target.shape)."""
    weight, bias = channel_map(stitch, form, target.channels)
    old, prefix = positions(source, value.numpy())
    count = 1 if target.layout is Layout.NC else target.numel // target.channels - target.prefix
    mixed = np.einsum("qp,npc->nqc", between(source, target, old.shape[1], count, form.regrid), old)
    new = np.einsum("dc,nqc->nqd", weight, mixed) + bias
    if target.prefix and form.map != "full":
        scale, shift = (1.0, 0.0) if form.map == "identity" else (stitch.scale[:-1], stitch.shift[:-1])
        scale, shift = (w.detach().numpy() if form.map == "affine" else w for w in (scale, shift))
        new = np.concatenate([prefix * scale + shift, new], 1)
    elif target.prefix:
        given = np.concatenate([old.mean(1, keepdims=True), prefix], 1).reshape(len(old), -1)
        first = given @ stitch.prefix.weight.detach().numpy().T + stitch.prefix.bias.detach().numpy()
        new = np.concatenate([first.reshape(len(old), target.prefix, target.channels), new], 1)
    if target.layout is Layout.NCHW:
        return np.moveaxis(new, 2, 1).reshape(len(old), *target.shape)
    return new.reshape(len(old), *target.shape)
