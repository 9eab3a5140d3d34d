"""Resizing maps: nearest neighbours in every way that ONNX knows, smooth ones where torch has the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from derc.onnxdonor.builder import Builder, check_batch
from derc.onnxdonor.tables import operator
from derc.onnxdonor.values import Operator, UnsupportedError

SMOOTH = {"linear": "bilinear", "cubic": "bicubic"}


@operator("Resize", "Upsample")
def resize(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    place = op.get("coordinate_transformation_mode", "half_pixel") if op.version >= 11 else "asymmetric"
    if op.get("keep_aspect_ratio_policy", "stretch") != "stretch" or op.get("axes"):
        raise UnsupportedError(f"{op} names only some axes")
    sizes, scales = _resized(net, op, x)
    changed = [axis for axis in range(net.rank(x)) if sizes[axis] != net.shape(x)[axis]]
    check_batch(net, op, x, changed)
    if op.get("mode", "nearest") != "nearest":
        return _smooth(net, op, x, sizes, scales, place)
    rounding = op.get("nearest_mode", "round_prefer_floor") if op.version >= 11 else "floor"
    for axis in changed:
        indices = _nearest(net.shape(x)[axis], sizes[axis], scales[axis], place, rounding)
        flat = net.attribute(f"{op.node.output[0]}_indices", indices, trained=False)
        x = net.call(torch.index_select, x, axis, flat)
    return x


def _smooth(net: Builder, op: Operator, x: fx.Node, sizes: list[int], scales: list[float], place: str) -> fx.Node:
    """Bilinear and bicubic maps, where positions are found as torch does."""
    shape, mode = net.shape(x), SMOOTH.get(op.get("mode"))
    exact = all(size == n * scale for size, n, scale in zip(sizes, shape, scales, strict=True))
    alike = place == "align_corners" or (exact and place in ("half_pixel", "pytorch_half_pixel"))
    own = op.get("antialias", 0) or op.get("exclude_outside", 0) or op.get("cubic_coeff_a", -0.75) != -0.75
    if mode is None or len(shape) != 4 or list(shape[:2]) != sizes[:2] or not alike or own:
        raise UnsupportedError(f"{op} interpolates in another way")
    return net.call(F.interpolate, x, sizes[2:], mode=mode, align_corners=place == "align_corners")


def _resized(net: Builder, op: Operator, x: fx.Node) -> tuple[list[int], list[float]]:
    """Size and scale of every axis, from scales or sizes; the batch axis keeps its own."""
    shape = net.shape(x)
    where_scales = 1 if op.version < 11 else 2
    scales = op.get("scales") if op.version < 9 else None
    if scales is None and net.given(op, where_scales):
        scales = net.array(op, where_scales).tolist() or None
    if scales is not None:
        if len(scales) != len(shape):
            raise UnsupportedError(f"{op} names only some axes")
        return [int(np.floor(np.float32(n) * np.float32(s))) for n, s in zip(shape, scales, strict=True)], list(scales)
    found = net.known(op, 3).arrays[0].tolist()
    if len(found) != len(shape):
        raise UnsupportedError(f"{op} names only some axes")
    return [int(size) for size in found], [size / n for size, n in zip(found, shape, strict=True)]


def _nearest(before: int, after: int, scale: float, place: str, rounding: str) -> Any:
    """The old position that each new one takes its value from, in float32 as runtimes do: ties depend on it."""
    half, zero, step = np.float32(0.5), np.zeros(1, np.float32), np.float32(scale)
    x = np.arange(after, dtype=np.float32)
    match place:
        case "half_pixel":
            x = (x + half) / step - half
        case "pytorch_half_pixel":
            x = (x + half) / step - half if after > 1 else zero
        case "asymmetric":
            x = x / step
        case "align_corners":
            x = x * np.float32(before - 1) / np.float32(after - 1) if after > 1 else zero
        case _:
            raise UnsupportedError(f"nearest neighbours by {place}")
    match rounding:
        case "round_prefer_floor":
            x = np.ceil(x - half)
        case "round_prefer_ceil":
            x = np.floor(x + half)
        case "floor":
            x = np.floor(x)
        case _:
            x = np.ceil(x)
    return np.clip(x, 0, before - 1).astype(np.int64)
