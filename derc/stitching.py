"""The stitch (adapter) between two cuts of any known layouts, with its cost.

The module depends on torch alone and takes plain numbers, because its source is written into every bundle's model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from derc.ir import Layout, TensorType

if TYPE_CHECKING:
    from derc.modules import Stitch


@dataclass(frozen=True)
class StitchCost:
    """Parameters, multiply-accumulates and output bytes of one stitch, for one image."""

    params: int
    macs: int
    bytes: int


def convertible(source: TensorType, target: TensorType) -> bool:
    """Whether a stitch from `source` to `target` exists: between all float32 values of known layouts."""
    return Layout.OTHER not in (source.layout, target.layout) and source.dtype == target.dtype == "float32"


def keeps_places(source: TensorType, target: TensorType) -> bool:
    """Whether a stitch exists that makes up no places, as every stitch that selection may choose.

    Pooled features (NC) say nothing of places, and tokens of an unknown grid nothing of rows and columns.
    """
    return convertible(source, target) and len(_grid(source)) >= len(_grid(target))


def _grid(kind: TensorType) -> tuple[int, ...]:
    """(H, W) of the positions, (L,) for tokens of an unknown grid, () for pooled features."""
    if kind.layout is Layout.NLC and kind.grid is None:
        return (kind.shape[0] - kind.prefix,)
    return kind.spatial or ()


def cost(source: TensorType, target: TensorType) -> StitchCost:
    """Cost of the stitch; the linear map runs where each axis is the shorter of the two."""
    (height, width), (rows, columns) = common_grids(source, target)
    body = source.channels * target.channels
    prefix = (1 + source.prefix) * source.channels * target.prefix * target.channels
    params = body + target.channels + (prefix + target.prefix * target.channels if target.prefix else 0)
    averaging = source.channels * _averaging(height, width, rows, columns)
    return StitchCost(params, averaging + min(height, rows) * min(width, columns) * body + prefix, 4 * target.numel)


def common_grids(source: TensorType, target: TensorType) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both grids as (H, W); all positions are one row unless both grids are known."""
    one, other = _grid(source), _grid(target)
    if len(one) == len(other) == 2:
        return (one[0], one[1]), (other[0], other[1])
    return (1, prod(one)), (1, prod(other))


def _averaging(height: int, width: int, rows: int, columns: int) -> int:
    """Multiply-accumulates of averaging one channel by area; an even average has none."""
    height = rows if height % rows == 0 else height
    width = columns if width % columns == 0 else width
    down = rows * height * width if height > rows else 0
    return down + (min(height, rows) * width * columns if width > columns else 0)


def key(source: TensorType, target: TensorType) -> str:
    """Name of the stitch's shape in a latency table; strides, which change nothing that runs, are no part of it."""
    return f"{describe(source)}>{describe(target)}"


def describe(kind: TensorType) -> str:
    """Compact form of a type, such as ``NCHW16x8x8`` or ``NLC65x48p1g8x8``."""
    text = f"{kind.layout}{'x'.join(map(str, kind.shape))}"
    if kind.layout is Layout.NLC:
        text += f"p{kind.prefix}" + (f"g{kind.grid[0]}x{kind.grid[1]}" if kind.grid else "")
    return text


def build(source: TensorType, target: TensorType) -> Stitch:
    """A randomly initialised stitch (default torch initialisation)."""
    from derc.modules import Stitch

    return Stitch(**arguments(source, target))


def arguments(source: TensorType, target: TensorType) -> dict[str, tuple[str, int, int, tuple[int, ...]]]:
    """Constructor arguments of the stitch module, as they appear in model.py."""
    return {
        "source": (str(source.layout), source.channels, source.prefix, _grid(source)),
        "target": (str(target.layout), target.channels, target.prefix, _grid(target)),
    }
