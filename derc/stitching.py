"""The stitch (adapter) between two cuts of any known layouts, with its forms and what each costs.

The module depends on torch alone and takes plain numbers, because its source is written into every bundle's model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from derc.ir import Layout, TensorType

if TYPE_CHECKING:
    from derc.modules import Stitch


REGRIDS = ("mean", "strided", "bilinear")
MAPS = ("full", "affine", "identity")
RANK = "rank"


@dataclass(frozen=True, order=True)
class Form:
    """How a stitch meets a coarser grid, and what it does to the channels.

    `regrid` is "mean" (by area), "strided" (the first position of each cell, where axes shrink by whole factors) or
    "bilinear" (between the centres of the nearest positions). `map` is "full", through `rank` directions only where
    that is not 0, "affine" (a scale and a shift for each channel) or "identity".
    """

    regrid: str = "mean"
    map: str = "full"
    rank: int = 0

    def __str__(self) -> str:
        """What is not as by default, such as ``strided+rank8``; the default form is empty."""
        words = [self.regrid] if self.regrid != PLAIN.regrid else []
        words += [self.map] if self.map != PLAIN.map else []
        return "+".join([*words, f"{RANK}{self.rank}"] if self.rank else words)

    @staticmethod
    def parse(text: str) -> Form:
        """Inverse of `str`."""
        words = set(text.split("+"))
        ranks = [int(word.removeprefix(RANK)) for word in words if word.startswith(RANK)]
        regrid, mapped = (next((w for w in known if w in words), known[0]) for known in (REGRIDS, MAPS))
        return Form(regrid, mapped, ranks[0] if ranks else 0)

    @property
    def linear(self) -> bool:
        """Whether its map is a whole matrix."""
        return self.map == "full" and not self.rank

    @property
    def name(self) -> str:
        """What manifest and report call it."""
        return str(self) or "full"


PLAIN = Form()
Forms = dict[str, dict[str, Form]]
"""Of stitches, by the names of the cuts that they lead from and to; what is not in it has the default form."""


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


def obstacle(source: TensorType, target: TensorType, form: Form) -> str:
    """Why a stitch from `source` to `target`, which exists, cannot have the form; empty where it can."""
    old, new = common_grids(source, target)
    shrinking = [(a, b) for a, b in zip(old, new, strict=True) if a > b]
    if form.regrid not in REGRIDS or form.map not in MAPS:
        return f"there is no form {form.name}"
    if form.regrid != PLAIN.regrid and (not shrinking or target.layout is Layout.NC):
        return f"nothing is to be {form.regrid}, for no axis of positions shrinks"
    if form.regrid == "strided" and any(a % b for a, b in shrinking):
        return "a strided stitch shrinks axes by whole factors"
    if form.map != PLAIN.map and source.channels != target.channels:
        return f"{form.map} is between equal widths"
    if form.map != PLAIN.map and target.prefix not in (0, source.prefix):
        return f"{form.map} is between equal numbers of class and register tokens"
    if form.rank and (form.map != PLAIN.map or not 0 < form.rank < min(source.channels, target.channels)):
        return "a rank is of a full map, and below both widths"
    return ""


def free(source: TensorType, target: TensorType, form: Form) -> bool:
    """Whether the stitch does nothing at all."""
    return form.map == "identity" and describe(source) == describe(target)


def cost(source: TensorType, target: TensorType, form: Form = PLAIN) -> StitchCost:
    """Cost of the stitch; the map runs where each axis is the shorter of the two."""
    (height, width), (rows, columns) = common_grids(source, target)
    averaging = source.channels * _averaging(height, width, rows, columns) if form.regrid == "mean" else 0
    runs, size = min(height, rows) * min(width, columns), 4 * target.numel
    if form.map != PLAIN.map:
        scales = target.channels if form.map == "affine" else 0
        return StitchCost(2 * (1 + target.prefix) * scales, averaging + (runs + target.prefix) * scales, size)
    body = source.channels * target.channels
    if form.rank:
        body = form.rank * (source.channels + target.channels)
    prefix = (1 + source.prefix) * source.channels * target.prefix * target.channels
    params = body + target.channels + (prefix + target.prefix * target.channels if target.prefix else 0)
    return StitchCost(params, averaging + runs * body + prefix, size)


def moved(source: TensorType, target: TensorType, form: Form = PLAIN) -> int:
    """Elements that the stitch reads and writes, for one image."""
    read = source.numel
    if form.regrid == "strided":
        old, new = common_grids(source, target)
        read = source.numel * prod(min(pair) for pair in zip(old, new, strict=True)) // prod(old)
    return read + target.numel


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


def key(source: TensorType, target: TensorType, form: Form = PLAIN) -> str:
    """Name of the stitch's shape in a latency table, with its form where that is not the default.

    Strides of types, which change nothing that runs, are no part of it.
    """
    shape = f"{describe(source)}>{describe(target)}"
    return f"{shape}:{form}" if form != PLAIN else shape


def parted(name: str) -> tuple[str, str, Form]:
    """What the types of a stitch's `key` are described as, and its form."""
    shape, _, form = name.partition(":")
    source, _, target = shape.partition(">")
    return source, target, Form.parse(form)


def costs_nothing(name: str) -> bool:
    """Whether the stitch of this `key` does nothing at all, so that no latency table has it."""
    source, target, form = parted(name)
    return form.map == "identity" and source == target


def describe(kind: TensorType) -> str:
    """Compact form of a type, such as ``NCHW16x8x8`` or ``NLC65x48p1g8x8``."""
    text = f"{kind.layout}{'x'.join(map(str, kind.shape))}"
    if kind.layout is Layout.NLC:
        text += f"p{kind.prefix}" + (f"g{kind.grid[0]}x{kind.grid[1]}" if kind.grid else "")
    return text


def build(source: TensorType, target: TensorType, form: Form = PLAIN) -> Stitch:
    """A stitch initialised as torch does: a random linear map; affine ones begin as the identity."""
    from derc.modules import Stitch

    return Stitch(**arguments(source, target, form))


def arguments(source: TensorType, target: TensorType, form: Form = PLAIN) -> dict[str, Any]:
    """Constructor arguments of the stitch module, as they appear in model.py."""
    return {
        "source": (str(source.layout), source.channels, source.prefix, _grid(source)),
        "target": (str(target.layout), target.channels, target.prefix, _grid(target)),
        **({"form": (form.regrid, form.map, form.rank)} if form != PLAIN else {}),
    }
