"""Which axis is which: the axes of every value, followed from operation to operation.

An axis is C (channels), H, W, L (tokens: a map's positions in a row, maybe behind prefix tokens), or ? where unknown.
What an operation is known to do to axes is a rule below; what no rule knows is told by its shape and the maps near it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

import torch
from torch import fx, nn

from derc.ir import Layout, TensorType

MAP = ("C", "H", "W")
LAST = ("H", "W", "C")
TOKENS = ("L", "C")
LAYOUTS: dict[tuple[str, ...], Layout] = {MAP: Layout.NCHW, LAST: Layout.NHWC, TOKENS: Layout.NLC, ("C",): Layout.NC}
Grid = tuple[int, int]

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
SPATIAL_FUNCTIONS: tuple[str, ...] = (
    "conv2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "batch_norm",
    "group_norm",
)
SPATIAL_FUNCTIONS += ("interpolate", "pixel_shuffle", "pixel_unshuffle")
SEQUENCE_MODULES = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)
"""Modules whose three-dimensional output has its channels before its positions."""
CONTRACTIONS = ("matmul", "bmm", "einsum", "scaled_dot_product_attention", "baddbmm", "outer")
SPLITS = ("split", "chunk", "tensor_split", "split_with_sizes")
JOINS = ("cat", "concat", "concatenate")
RESIZES = (*JOINS, "getitem", "narrow", "pad", "mean", "sum", "amax", "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d")
"""What may change sizes, but neither the number nor the order of axes."""
RESHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone")
MAX_PREFIX = 16


@dataclass(frozen=True)
class Axes:
    """A value's `shape` and axes, the batch axis left out; `prefix` and `grid` (H, W) belong to an axis L.

    `scattered` tokens are in an order of their own, not row by row, and so on no grid.
    """

    shape: tuple[int, ...]
    labels: tuple[str, ...]
    prefix: int = 0
    grid: Grid | None = None
    scattered: bool = False

    @property
    def maps(self) -> tuple[Grid, ...]:
        """The (H, W) that the value is laid out on."""
        if "H" in self.labels and "W" in self.labels:
            return ((self.shape[self.labels.index("H")], self.shape[self.labels.index("W")]),)
        return (self.grid,) if self.grid else ()

    def type(self, dtype: str) -> TensorType:
        """The type; OTHER where the axes are in no order that has a name."""
        layout = LAYOUTS.get(self.labels, Layout.OTHER)
        if layout is Layout.NLC:
            return TensorType(self.shape, layout, dtype, self.prefix, self.grid)
        return TensorType(self.shape, layout, dtype)


def follow(
    node: fx.Node,
    shape: tuple[int, ...],
    operands: Mapping[fx.Node, Axes],
    near: Sequence[Grid],
    module: nn.Module | None = None,
) -> Axes:
    """Axes of what `node` gives, of `shape`: it calls `module` and is made from maps of the (H, W) in `near`."""
    if node.op == "placeholder":
        return Axes(shape, MAP)
    if len(shape) == 1:
        return Axes(shape, ("C",))
    known = [operands[n] for n in _sources(node) if n in operands]
    for rule in (_by_module, _by_permutation, _by_reshape, _by_shape_kept):
        found = rule(node, shape, known, module)
        if found is not None:
            return _completed(found, near)
    return _guessed(node, shape, known, near)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The node's operands; for a part of what a split gives, what was split."""
    whole = node.all_input_nodes[0] if target_name(node) == "getitem" and node.all_input_nodes else node
    return (whole if target_name(whole) in SPLITS else node).all_input_nodes


def target_name(node: fx.Node) -> str:
    """Name of the function, method or attribute that a node refers to."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _by_module(node: fx.Node, shape: tuple[int, ...], known: list[Axes], module: nn.Module | None) -> Axes | None:
    """What convolutions, pooling and linear layers make of their axes."""
    name = target_name(node) if module is None else ""
    if len(shape) == 3 and (isinstance(module, SPATIAL_MODULES) or name in SPATIAL_FUNCTIONS):
        return Axes(shape, MAP)
    if len(shape) == 2 and (isinstance(module, SEQUENCE_MODULES) or name == "conv1d"):
        return _with_tokens(shape, ("C", "L"), known)
    if type(module) is nn.Linear or name == "linear":
        before = next((k for k in known if len(k.shape) == len(shape)), None)
        if before is None:
            return None
        last = "C" if before.labels[-1] == "C" or "C" not in before.labels else "?"
        return replace(before, shape=shape, labels=(*before.labels[:-1], last))
    return None


def _by_permutation(node: fx.Node, shape: tuple[int, ...], known: list[Axes], module: nn.Module | None) -> Axes | None:
    """Axes in their new order."""
    if module is not None or not known or len(known[0].shape) != len(shape):
        return None
    order = permutation(node, len(shape) + 1)
    if order is None:
        return None
    if order[0] != 0:
        return Axes(shape, ("?",) * len(shape))
    return replace(known[0], shape=shape, labels=tuple(known[0].labels[axis - 1] for axis in order[1:]))


def permutation(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """The order that a node puts the axes of its operand in, the batch axis included; None where it does not."""
    name, raw = target_name(node), node.args[1:]
    if name == "permute":
        flat: Any = raw[0] if len(raw) == 1 else raw
        flat = node.kwargs.get("dims", flat)
        return tuple(axis % rank for axis in flat)
    if name in ("transpose", "swapaxes", "swapdims", "transpose_"):
        pair: Any = raw or tuple(node.kwargs.values())
        first, second = (axis % rank for axis in pair)
        order = list(range(rank))
        order[first], order[second] = second, first
        return tuple(order)
    return None


def _by_reshape(node: fx.Node, shape: tuple[int, ...], known: list[Axes], module: nn.Module | None) -> Axes | None:
    """Axes merged and split where the sizes tell which; everything else is unknown."""
    flattens = isinstance(module, (nn.Flatten, nn.Unflatten))
    if not flattens and (module is not None or target_name(node) not in RESHAPES):
        return None
    if not known or prod(known[0].shape) != prod(shape) or 0 in shape:
        return Axes(shape, ("?",) * len(shape))
    return regroup(known[0], shape)


def regroup(before: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes of a value of another shape and the same elements in the same order.

    Where H is split in two, the outer part stays H and the inner one is h, and so for W: both h and w may go into C.
    """
    labels: list[str] = []
    prefix, grid = before.prefix, before.grid
    for old, new in _groups(before.shape, shape):
        names = tuple(before.labels[i] for i in old if before.shape[i] != 1) or tuple(before.labels[i] for i in old)
        wide = [i for i in new if shape[i] != 1] or new[:1]
        renamed = _renamed(names, tuple(shape[i] for i in wide), before)
        if renamed == ("L",) and names == ("H", "W"):
            prefix, grid = 0, (before.shape[old[0]], before.shape[old[-1]])
        labels += [renamed[wide.index(i)] if i in wide else "?" for i in new]
    if "L" not in labels:
        return Axes(shape, tuple(labels))
    return Axes(shape, tuple(labels), prefix, grid, before.scattered)


MERGES: dict[tuple[str, ...], str] = {("H", "W"): "L", ("H", "h"): "H", ("W", "w"): "W"}
SPLITS_OF = {"H": ("H", "h"), "W": ("W", "w")}


def _renamed(names: tuple[str, ...], sizes: tuple[int, ...], before: Axes) -> tuple[str, ...]:
    """Axes of `sizes` that the axes `names` of a value become, those of size one left out on both sides."""
    unknown = ("?",) * len(sizes)
    if len(names) == len(sizes):
        return names
    if len(sizes) == 1:
        channels = "C" in names and set(names) <= {"h", "w", "C"}
        return ("C",) if channels else (MERGES.get(names, "?"),)
    if len(names) == 1 and len(sizes) == 2:
        tokens = names == ("L",) and before.prefix == 0 and not before.scattered and before.grid in (None, sizes)
        return ("H", "W") if tokens else SPLITS_OF.get(names[0], unknown)
    return unknown


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of runs of axes that hold the same number of elements."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        while prod(old[k] for k in left) != prod(new[k] for k in right):
            if prod(old[k] for k in left) < prod(new[k] for k in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        if left:
            found.append((left, right))
        else:
            found[-1][1].extend(right)
    return found


def _by_shape_kept(node: fx.Node, shape: tuple[int, ...], known: list[Axes], module: nn.Module | None) -> Axes | None:
    """Operations that leave the order of axes alone: element by element, along one axis, slices, pooled maps."""
    name = target_name(node) if module is None else ""
    if name in CONTRACTIONS:
        return Axes(shape, ("?",) * len(shape))
    alike = [k for k in known if len(k.shape) == len(shape) and set(k.labels) != {"?"}]
    if module is not None:
        alike = [k for k in alike if _keeps_order(k, shape)]
    elif name not in RESIZES:
        alike = [k for k in alike if k.shape == shape]
    if not alike:
        return None
    best = min(alike, key=lambda k: (k.labels.count("?"), _differ(k.shape, shape)))
    if module is not None and best.shape == shape and reorders(module, shape):
        return Axes(shape, TOKENS if best.labels == TOKENS else ("?",) * len(shape), scattered=best.labels == TOKENS)
    if name in JOINS and "L" in best.labels and known[-1] is not best:
        return Axes(shape, best.labels)
    return _with_tokens(shape, best.labels, [best])


def reorders(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a module without weights gives its input's elements in another order, as those that gather windows do."""
    if next(module.parameters(), None) is not None or type(module).__module__.startswith("torch.nn"):
        return False
    x = torch.arange(prod(shape), dtype=torch.float32).reshape(1, *shape)
    with torch.no_grad():
        y = module(x.clone())
    return not torch.equal(x, y) and torch.equal(x.flatten(), y.flatten().sort().values)


def _differ(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _keeps_order(before: Axes, shape: tuple[int, ...]) -> bool:
    """Whether a module of unknown kind leaves the axes in order: at most channels, or at most H and W, change."""
    changed = {label for label, a, b in zip(before.labels, before.shape, shape, strict=True) if a != b}
    return changed <= {"C"} or changed <= {"H", "W"} or (before.labels == MAP and shape[1] == shape[2])


def _with_tokens(shape: tuple[int, ...], labels: tuple[str, ...], known: list[Axes]) -> Axes:
    """Axes with the grid of the first operand's tokens, and as many prefix tokens as are left beside it."""
    if "L" not in labels:
        return Axes(shape, labels)
    if any(k.scattered for k in known):
        return Axes(shape, labels, scattered=True)
    grid = next((g for k in known for g in k.maps), None)
    prefix = shape[labels.index("L")] - prod(grid) if grid else 0
    return Axes(shape, labels, prefix, grid) if 0 <= prefix <= MAX_PREFIX else Axes(shape, labels)


def _completed(found: Axes, near: Sequence[Grid]) -> Axes:
    """The one unknown axis filled in where the other leaves no doubt, and the grid of tokens where one near fits."""
    labels = found.labels
    if labels.count("?") == 1 and labels[-1] == "?" and labels[:-1] in (("L",), ("H", "W")):
        labels = (*labels[:-1], "C")
    if labels == ("?", "C"):
        return replace(found, labels=TOKENS, scattered=True)
    found = replace(found, labels=labels)
    if "L" in labels and found.grid is None and not found.scattered:
        length = found.shape[labels.index("L")]
        fits = [g for g in near if 0 <= length - prod(g) <= MAX_PREFIX]
        if fits:
            return replace(found, prefix=length - prod(fits[0]), grid=fits[0])
    return found


def _guessed(node: fx.Node, shape: tuple[int, ...], known: list[Axes], near: Sequence[Grid]) -> Axes:
    """By shape alone: an axis or two that are as large as a map near by are its positions."""
    match len(shape):
        case 2:
            return _guessed_tokens(shape, near, opaque=node.op == "call_module")
        case 3:
            return _guessed_map(shape, near, opaque=node.op == "call_module")
        case _:
            return Axes(shape, ("?",) * len(shape))


def _guessed_map(shape: tuple[int, ...], near: Sequence[Grid], *, opaque: bool) -> Axes:
    tests: list[tuple[tuple[str, ...], Callable[[Grid], bool]]] = [
        (MAP, lambda g: shape[1:] == g),
        (LAST, lambda g: shape[:2] == g),
    ]
    for labels, fits in tests:
        if any(fits(grid) for grid in near):
            return Axes(shape, labels)
    if opaque and shape[1] == shape[2] != shape[0]:
        return Axes(shape, MAP)
    if opaque and shape[0] == shape[1] != shape[2]:
        return Axes(shape, LAST)
    return Axes(shape, ("?",) * 3)


def _guessed_tokens(shape: tuple[int, ...], near: Sequence[Grid], *, opaque: bool) -> Axes:
    """(L, C) with at most MAX_PREFIX prefix tokens, (C, L), or what an opaque patch embedding made of a map."""
    for grid in near:
        prefix = shape[0] - prod(grid)
        if 0 <= prefix <= MAX_PREFIX and shape[1] != prod(grid):
            return Axes(shape, TOKENS, prefix, grid)
    if any(shape[1] == prod(grid) for grid in near):
        return Axes(shape, ("C", "L"))
    return (_scaled_grid(shape, near) if opaque else None) or Axes(shape, TOKENS if opaque else ("?", "?"))


def _scaled_grid(shape: tuple[int, ...], near: Sequence[Grid]) -> Axes | None:
    """Tokens of the nearest map shrunk evenly, with the fewest leading tokens."""
    for height, width in near:
        for prefix in range(min(MAX_PREFIX, shape[0] - 1) + 1):
            factor = sqrt(height * width / (shape[0] - prefix))
            grid = round(height / factor), round(width / factor)
            if factor >= 1 and prod(grid) == shape[0] - prefix and grid[0] * width == grid[1] * height:
                return Axes(shape, TOKENS, prefix, grid)
    return None
