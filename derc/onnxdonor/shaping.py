"""Operators that move elements: reshaping, slicing, joining, padding, resizing."""

from __future__ import annotations

import operator as plain
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from derc.onnxdonor.builder import Builder, Size, check_batch
from derc.onnxdonor.tables import operator
from derc.onnxdonor.values import FACTORS, Operator, UnsupportedError

PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Identity")
def identity(net: Builder, op: Operator) -> fx.Node:
    return net.tensor(op, 0)


@operator("Dropout")
def dropout(net: Builder, op: Operator) -> fx.Node:
    if net.given(op, 2) and bool(net.array(op, 2)):
        raise UnsupportedError(f"{op} is in training mode")
    ratio = op.get("ratio", 0.5) if op.version < 12 else float(net.array(op, 1, 0.5))
    return net.module(op.node.name or op.node.output[0], nn.Dropout(ratio), net.tensor(op, 0))


@operator("Reshape")
def reshape(net: Builder, op: Operator) -> fx.Node:
    x, target = net.tensor(op, 0), net.known(op, 1)
    resolved = []
    for shape, wanted in zip(net.shapes(x), target.arrays, strict=True):
        resolved.append(_resolve(shape, wanted.tolist(), copies=not op.get("allowzero", 0)))
    if target.fixed and not net.free:
        return _regrouped(net, op, x, resolved[0])
    return net.method("reshape", x, _inferred(net, resolved, x))


def _regrouped(net: Builder, op: Operator, x: fx.Node, target: list[int]) -> fx.Node:
    """The tensor in the shape `target`, which is for the file's own batch size, for any batch size."""
    sizes: list[Size] = list(target)
    if not net.varying(x):
        return net.method("reshape", x, sizes)
    place, inner = _images_axis(net, op, x, target)
    sizes[place] = -1
    y = net.method("reshape", x, sizes)
    y.meta["inner"] = inner
    return y


def _inferred(net: Builder, shapes: list[list[int]], source: fx.Node) -> list[Size]:
    """Sizes where the one that depends on the batch size is left to torch."""
    differ = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(differ) == 1:
        return [-1 if axis == differ[0] else size for axis, size in enumerate(shapes[0])]
    return net.sizes(shapes, source)


def _resolve(shape: tuple[int, ...], wanted: list[int], *, copies: bool) -> list[int]:
    """The target of a Reshape without its 0 (copy the axis) and -1 (whatever is left)."""
    found = [shape[axis] if size == 0 and copies else int(size) for axis, size in enumerate(wanted)]
    if -1 in found:
        rest = prod(size for size in found if size != -1)
        found[found.index(-1)] = prod(shape) // max(rest, 1)
    return found


def _images_axis(net: Builder, op: Operator, x: fx.Node, target: list[int]) -> tuple[int, int]:
    """The axis of `target` that the images of a fixed batch lie along, and how much of it lies outside of them.

    As many elements are before the images as in `x`. An axis of their own comes first; next they join the axis before,
    where that after is not split (T, N, C → T·N, C); else the one after (T, N, C → T, N·heads, C / heads).
    """
    shape, batch = net.shape(x), net.batch
    axis = net.varying(x)[0]
    outside = prod(shape[:axis]) * x.meta.get("inner", 1)
    starts = [place for place in range(len(target)) if prod(target[:place]) == outside]
    for place in starts:
        if target[place] == batch:
            return place, 1
    next_size = shape[axis + 1] if axis + 1 < len(shape) else 1
    for place in range(1, len(target) + 1):
        whole = place == len(target) or target[place] >= next_size
        if outside > 1 and whole and prod(target[:place]) == outside * batch:
            return place - 1, target[place - 1] // batch
    for place in starts:
        if target[place] % batch == 0:
            return place, 1
    raise UnsupportedError(f"{op} mixes the images of a batch with other axes")


@operator("Flatten")
def flatten(net: Builder, op: Operator) -> fx.Node:
    x, axis = net.tensor(op, 0), op.get("axis", 1)
    axis = axis % net.rank(x) if axis < 0 else axis
    if axis == 1:
        return net.call(torch.flatten, x, 1)
    return net.method("reshape", x, _inferred(net, [[prod(s[:axis]), prod(s[axis:])] for s in net.shapes(x)], x))


@operator("Transpose")
def transpose(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    return net.method("permute", x, op.get("perm", list(reversed(range(net.rank(x))))))


@operator("Squeeze")
def squeeze(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    axes = net.integers(op, "axes", 1)
    if axes is None:
        axes = [axis for axis, size in enumerate(net.shape(x)) if size == 1]
    check_batch(net, op, x, axes)
    return net.call(torch.squeeze, x, tuple(axes)) if axes else x


@operator("Unsqueeze")
def unsqueeze(net: Builder, op: Operator) -> fx.Node:
    x, axes = net.tensor(op, 0), net.integers(op, "axes", 1) or []
    rank = net.rank(x) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = net.call(torch.unsqueeze, x, axis)
    return x


@operator("Concat")
def concat(net: Builder, op: Operator) -> fx.Node:
    parts = [net.tensor(op, index) for index in range(len(op.node.input))]
    axis = op.get("axis", 1) % net.rank(parts[0])
    batched = {place for part in parts for place in net.varying(part)} - {axis}
    return net.call(torch.cat, [_spread(net, part, batched, parts) for part in parts], axis)


def _spread(net: Builder, part: fx.Node, batched: set[int], parts: list[fx.Node]) -> fx.Node:
    """A part that is the same for every image, repeated for each where the others have one."""
    places = [place for place in batched if place not in net.varying(part) and net.shape(part)[place] == 1]
    if not places:
        return part
    model = next(other for other in parts if places[0] in net.varying(other))
    sizes: list[Size] = [-1] * net.rank(part)
    for place in places:
        sizes[place] = net.method("size", model, place)
    return net.method("expand", part, sizes)


@operator("Split")
def split(net: Builder, op: Operator) -> list[fx.Node]:
    x, axis = net.tensor(op, 0), op.get("axis", 0)
    check_batch(net, op, x, [axis])
    size, count = net.shape(x)[axis], len(op.node.output)
    sizes = net.integers(op, "split", 1)
    if sizes is None:
        step = -(-size // count)
        sizes = [step] * (count - 1) + [size - step * (count - 1)]
    parts = net.call(torch.split, x, sizes, axis)
    return [net.call(plain.getitem, parts, index) for index in range(count)]


@operator("Slice")
def cut_out(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    if op.version < 10:
        starts, ends = (np.array([op.get(name)] * len(FACTORS)) for name in ("starts", "ends"))
        axes = op.get("axes", list(range(starts.shape[1])))
        steps = [1] * len(axes)
    else:
        starts, ends = (np.stack([a.reshape(-1) for a in net.known(op, i).arrays]) for i in (1, 2))
        axes = net.array(op, 3, list(range(starts.shape[1]))).tolist()
        steps = net.array(op, 4, [1] * len(axes)).tolist()
    for place, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        x = _slice(net, op, x, axis % net.rank(x), (starts[:, place], ends[:, place], int(step)))
    return x


def _slice(net: Builder, op: Operator, x: fx.Node, axis: int, span: tuple[Any, Any, int]) -> fx.Node:
    """One axis sliced, left alone where everything is kept."""
    starts, ends, step = span
    sizes = [shape[axis] for shape in net.shapes(x)]
    if step < 0:
        everything = all(
            range(n)[int(s) : int(e) : step] == range(n)[::-1] for n, s, e in zip(sizes, starts, ends, strict=True)
        )
        if step != -1 or not (everything or int(ends[0]) < -sizes[0]):
            raise UnsupportedError(f"{op} goes backwards")
        check_batch(net, op, x, [axis])
        return net.call(torch.flip, x, [axis])
    found = [slice(int(s), int(e), step).indices(n) for s, e, n in zip(starts, ends, sizes, strict=True)]
    if step == 1 and all((low, high) == (0, n) for (low, high, _), n in zip(found, sizes, strict=True)):
        return x
    if step == 1 and axis in net.varying(x) and found[0][:2] == (0, sizes[0]):
        return x
    check_batch(net, op, x, [axis])
    if len(set(found)) > 1:
        raise UnsupportedError(f"{op} depends on the batch size")
    low, high, _ = found[0]
    part = slice(low, high) if step == 1 else slice(low, high, step)
    return net.call(plain.getitem, x, (*[slice(None)] * axis, part))


@operator("Gather")
def gather(net: Builder, op: Operator) -> fx.Node:
    x, indices, axis = net.tensor(op, 0), net.array(op, 1), op.get("axis", 0)
    axis %= net.rank(x)
    size = net.shape(x)[axis]
    indices = indices % size
    if not net.free and np.array_equal(indices.reshape(-1), np.arange(size)):
        return _regrouped(net, op, x, [*net.shape(x)[:axis], *indices.shape, *net.shape(x)[axis + 1 :]])
    check_batch(net, op, x, [axis])
    if indices.ndim == 0:
        return net.call(torch.select, x, axis, int(indices))
    flat = net.attribute(f"{op.node.output[0]}_indices", indices.reshape(-1), trained=False)
    y = net.call(torch.index_select, x, axis, flat)
    return y if indices.ndim == 1 else net.method("unflatten", y, axis, list(indices.shape))


@operator("GatherElements")
def gather_elements(net: Builder, op: Operator) -> fx.Node:
    x, axis = net.tensor(op, 0), op.get("axis", 0)
    check_batch(net, op, x, [axis])
    indices = net.tensor(op, 1)
    positive = net.call(torch.remainder, indices, net.shape(x)[axis])
    return net.call(torch.gather, x, axis, positive)


@operator("Expand")
def expand(net: Builder, op: Operator) -> fx.Node:
    x, target = net.tensor(op, 0), net.known(op, 1)
    before = net.shapes(x)
    after = [np.broadcast_shapes(s, tuple(t.tolist())) for s, t in zip(before, _fitting(net, x, target), strict=True)]
    sizes = net.sizes(after, target.source)
    offset = len(after[0]) - len(before[0])
    for axis, size in enumerate(before[0]):
        if size == after[0][axis + offset] and axis in net.varying(x):
            sizes[axis + offset] = -1
    return net.method("expand", x, sizes)


def _fitting(net: Builder, x: fx.Node, target: Any) -> list[Any]:
    """The target for each batch size, 1 where a fixed one names the batch size of the file."""
    arrays = [array.copy() for array in target.arrays]
    for axis in net.varying(x) if target.fixed else []:
        place = axis - net.rank(x)
        for array in arrays:
            if -place <= len(array) and array[place] == net.shape(x)[axis]:
                array[place] = 1
    return arrays


@operator("ConstantOfShape")
def filled(net: Builder, op: Operator) -> fx.Node:
    value = op.get("value")
    number = 0.0 if value is None else float(np.frombuffer(value.raw_data, np.float32)[0]) if value.raw_data else None
    if value is not None and (value.data_type != 1 or number is None):
        raise UnsupportedError(f"{op} fills with something else than float32")
    shape = net.known(op, 0)
    return net.call(torch.full, net.sizes([array.tolist() for array in shape.arrays], shape.source), number)


@operator("Tile")
def tile(net: Builder, op: Operator) -> fx.Node:
    x, repeats = net.tensor(op, 0), net.known(op, 1)
    check_batch(net, op, x, [axis for axis, times in enumerate(repeats.arrays[0].tolist()) if times != 1])
    return net.method("repeat", x, net.sizes([array.tolist() for array in repeats.arrays], repeats.source))


@operator("Trilu")
def triangle(net: Builder, op: Operator) -> fx.Node:
    function = torch.triu if op.get("upper", 1) else torch.tril
    return net.call(function, net.tensor(op, 0), int(net.array(op, 1, 0).reshape(())))


@operator("Pad")
def pad(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    sides, mode = net.integers(op, "pads", 1) or [], op.get("mode", "constant")
    axes = net.array(op, 3).tolist() if net.given(op, 3) else list(range(net.rank(x)))
    before, after = [0] * net.rank(x), [0] * net.rank(x)
    for place, axis in enumerate(axes):
        before[axis], after[axis] = sides[place], sides[place + len(axes)]
    wide = [axis for axis in range(net.rank(x)) if before[axis] or after[axis]]
    if not wide:
        return x
    check_batch(net, op, x, wide)
    if mode != "constant" and (wide[0] < 2 or net.rank(x) > 4 or (mode == "wrap" and net.rank(x) != 4)):
        raise UnsupportedError(f"{op} pads other axes than torch does")
    first = wide[0] if mode == "constant" else 2
    flat = [side for axis in reversed(range(first, net.rank(x))) for side in (before[axis], after[axis])]
    value = op.get("value", 0.0) if op.version < 11 else float(net.array(op, 2, 0.0).reshape(()))
    return net.call(F.pad, x, flat, PAD_MODES[mode], value if mode == "constant" else None)


@operator("DepthToSpace")
def depth_to_space(net: Builder, op: Operator) -> fx.Node:
    x, block = net.tensor(op, 0), op.get("blocksize")
    if op.get("mode", "DCR") == "CRD":
        return net.call(F.pixel_shuffle, x, block)
    _, channels, height, width = net.shape(x)
    y = net.method("reshape", x, [-1, block, block, channels // block**2, height, width])
    y = net.method("permute", y, [0, 3, 4, 1, 5, 2])
    return net.method("reshape", y, [-1, channels // block**2, height * block, width * block])


@operator("SpaceToDepth")
def space_to_depth(net: Builder, op: Operator) -> fx.Node:
    x, block = net.tensor(op, 0), op.get("blocksize")
    _, channels, height, width = net.shape(x)
    y = net.method("reshape", x, [-1, channels, height // block, block, width // block, block])
    y = net.method("permute", y, [0, 3, 5, 1, 2, 4])
    return net.method("reshape", y, [-1, channels * block**2, height // block, width // block])
