"""The stitch (adapter) between two cuts of any convertible layouts, with its cost.

The module depends on torch alone and takes plain numbers, because its source is written into every bundle's model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Whether a stitch from `source` to `target` exists: a map cannot be made from pooled features (NC)."""
    if Layout.OTHER in (source.layout, target.layout) or not source.dtype == target.dtype == "float32":
        return False
    return target.spatial is None or source.spatial is not None


def _positions(kind: TensorType) -> int:
    height, width = kind.spatial or (1, 1)
    return height * width


def cost(source: TensorType, target: TensorType) -> StitchCost:
    """Cost of the stitch; the linear map runs on the smaller of the two grids."""
    positions = min(_positions(source), _positions(target))
    body = source.channels * target.channels
    prefix = (1 + source.prefix) * source.channels * target.prefix * target.channels
    params = body + target.channels + (prefix + target.prefix * target.channels if target.prefix else 0)
    return StitchCost(params, positions * body + prefix, 4 * target.numel)


def key(source: TensorType, target: TensorType) -> str:
    """Name of the stitch's shape in a latency table."""
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


def arguments(source: TensorType, target: TensorType) -> dict[str, tuple[str, int, int, tuple[int, int] | None]]:
    """Constructor arguments of the stitch module, as they appear in model.py."""
    return {
        "source": (str(source.layout), source.channels, source.prefix, source.spatial),
        "target": (str(target.layout), target.channels, target.prefix, target.spatial),
    }
