"""Which axis is which: the layout of a value, from the operation that makes it and its operands' types."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from torch import nn

from derc.ir import Layout, TensorType

SPATIAL_MODULES = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.InstanceNorm2d,
)
"""Modules whose four-dimensional output is NCHW."""
SPATIAL_FUNCTIONS = (
    "conv2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "batch_norm",
    "group_norm",
    "interpolate",
)
CHANNELS_LAST_MODULES = (nn.Linear, nn.LayerNorm)
TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)
MAX_PREFIX = 16


def infer(
    shape: tuple[int, ...],
    dtype: str,
    operands: Sequence[TensorType],
    *,
    module: nn.Module | None = None,
    function: str = "",
    axes: tuple[int, ...] | None = None,
    grids: Sequence[tuple[int, int]] = (),
) -> TensorType:
    """Type of a result of `shape` (no batch axis).

    `module` is the called module, `function` the name of the called function or method, `axes` the permutation that it
    applies where it is one, `grids` the (H, W) of the nearest maps that it comes from. What cannot be known gets the
    layout OTHER.
    """
    match len(shape):
        case 1:
            return TensorType(shape, Layout.NC, dtype)
        case 2:
            return _tokens(shape, dtype, grids)
        case 3:
            return TensorType(shape, _image(shape, operands, module, function, axes), dtype)
        case _:
            return TensorType(shape, Layout.OTHER, dtype)


def _image(
    shape: tuple[int, ...],
    operands: Sequence[TensorType],
    module: nn.Module | None,
    function: str,
    axes: tuple[int, ...] | None,
) -> Layout:
    if isinstance(module, SPATIAL_MODULES) or function in SPATIAL_FUNCTIONS:
        return Layout.NCHW
    if type(module) in CHANNELS_LAST_MODULES or function in ("linear", "layer_norm"):
        return Layout.NHWC
    known = [t for t in operands if t.layout in (Layout.NCHW, Layout.NHWC)]
    if axes is not None and known:
        if known[0].layout is Layout.NCHW and axes == TO_LAST:
            return Layout.NHWC
        if known[0].layout is Layout.NHWC and axes == TO_FIRST:
            return Layout.NCHW
        return Layout.OTHER
    return _by_shape(shape, known)


def _by_shape(shape: tuple[int, ...], known: Sequence[TensorType]) -> Layout:
    """An operand's layout where the shape allows it, else the one whose two spatial axes are alike."""
    for operand in known:
        if operand.shape == shape or operand.spatial == (shape[1:] if operand.layout is Layout.NCHW else shape[:2]):
            return operand.layout
    if shape[1] == shape[2] and shape[0] != shape[1]:
        return Layout.NCHW
    if shape[0] == shape[1] and shape[1] != shape[2]:
        return Layout.NHWC
    return known[0].layout if known else Layout.OTHER


def _tokens(shape: tuple[int, ...], dtype: str, grids: Sequence[tuple[int, int]]) -> TensorType:
    """Tokens (L, C): the grid is the nearest one that leaves at most MAX_PREFIX leading tokens."""
    for height, width in grids:
        prefix = shape[0] - height * width
        if 0 <= prefix <= MAX_PREFIX:
            return TensorType(shape, Layout.NLC, dtype, prefix, (height, width))
    return _scaled_grid(shape, dtype, grids)


def _scaled_grid(shape: tuple[int, ...], dtype: str, grids: Sequence[tuple[int, int]]) -> TensorType:
    """Tokens of an opaque patch embedding: the nearest map shrunk evenly, with the fewest leading tokens."""
    for height, width in grids:
        for prefix in range(min(MAX_PREFIX, shape[0] - 1) + 1):
            factor = sqrt(height * width / (shape[0] - prefix))
            grid = round(height / factor), round(width / factor)
            if factor >= 1 and grid[0] * grid[1] == shape[0] - prefix and grid[0] * width == grid[1] * height:
                return TensorType(shape, Layout.NLC, dtype, prefix, grid)
    return TensorType(shape, Layout.NLC, dtype)
