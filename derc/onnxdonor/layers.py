"""Operators with weights, and pooling: convolutions, linear layers, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from derc.artifacts import Array
from derc.onnxdonor.builder import Builder
from derc.onnxdonor.tables import operator
from derc.onnxdonor.values import Known, Operator, UnsupportedError, as_tensor

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORM = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
Pads = tuple[list[int], list[int]]


def hint(op: Operator, index: int = 1) -> str:
    """Where a module with the operator's weight belongs: as the weight or bias is called, without that ending."""
    for name, ending in zip(op.node.input[index:], (".weight", ".bias"), strict=False):
        if name.endswith(ending):
            return str(name).removesuffix(ending)
    return str(op.node.name or op.node.output[0])


def filled(module: nn.Module, **arrays: Array | None) -> nn.Module:
    """The module with copies of these arrays as its parameters and buffers, in the type that they have."""
    state = {name: as_tensor(array) for name, array in arrays.items() if array is not None}
    for kind in {value.dtype for value in state.values()} - {torch.float32}:
        module.to(kind)
    module.load_state_dict(module.state_dict() | state)
    return module


@operator("Conv")
def conv(net: Builder, op: Operator) -> fx.Node:
    x, weight = net.tensor(op, 0), net.array(op, 1)
    bias = net.array(op, 2) if net.given(op, 2) else None
    rank = weight.ndim - 2
    if rank not in CONV:
        raise UnsupportedError(f"{op} has {rank} dimensions")
    strides, dilations = op.get("strides", [1] * rank), op.get("dilations", [1] * rank)
    before, after = pads(net, op, x, list(weight.shape[2:]), strides, dilations)
    if before != after:
        x, before = padded(net, x, (before, after), 0.0), [0] * rank
    groups = op.get("group", 1)
    module = CONV[rank](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(strides),
        tuple(before),
        tuple(dilations),
        groups,
        bias is not None,
    )
    return net.module(hint(op), filled(module, weight=weight, bias=bias), x)


@operator("ConvTranspose")
def conv_transpose(net: Builder, op: Operator) -> fx.Node:
    x, weight = net.tensor(op, 0), net.array(op, 1)
    bias = net.array(op, 2) if net.given(op, 2) else None
    rank, groups = weight.ndim - 2, op.get("group", 1)
    strides, dilations = op.get("strides", [1] * rank), op.get("dilations", [1] * rank)
    extra = op.get("output_padding", [0] * rank)
    if rank not in TRANSPOSED or op.get("auto_pad", "NOTSET") != "NOTSET" or op.get("output_shape"):
        raise UnsupportedError(f"{op} has its padding in another form")
    both = op.get("pads", [0] * 2 * rank)
    before, after = both[:rank], both[rank:]
    module = TRANSPOSED[rank](
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        tuple(strides),
        tuple(before) if before == after else 0,
        tuple(extra),
        groups,
        bias is not None,
        tuple(dilations),
    )
    y = net.module(hint(op), filled(module, weight=weight, bias=bias), x)
    for axis, (low, high) in enumerate(zip(before, after, strict=True), start=2):
        if before != after:
            y = net.call(torch.narrow, y, axis, low, net.shape(y)[axis] - low - high)
    return y


def pads(
    net: Builder, op: Operator, x: fx.Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Pads:
    """Padding before and after each spatial axis, as `pads` or `auto_pad` say."""
    rank, mode = len(kernel), op.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        both = op.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return list(both[:rank]), list(both[rank:])
    totals = []
    for size, k, s, d in zip(net.shape(x)[2:], kernel, strides, dilations, strict=True):
        totals.append(max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size))
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def padded(net: Builder, x: fx.Node, sides: Pads, value: float) -> fx.Node:
    """The map with its spatial axes padded by a constant."""
    flat = [side for pair in zip(reversed(sides[0]), reversed(sides[1]), strict=True) for side in pair]
    return net.call(F.pad, x, flat, "constant", value)


@operator("MaxPool")
def max_pool(net: Builder, op: Operator) -> fx.Node:
    x, kernel = net.tensor(op, 0), op.get("kernel_shape")
    rank = len(kernel)
    if len(op.node.output) > 1 or rank not in MAX_POOL:
        raise UnsupportedError(f"{op} also gives indices")
    strides, dilations = op.get("strides", [1] * rank), op.get("dilations", [1] * rank)
    before, after = pads(net, op, x, kernel, strides, dilations)
    ceil = bool(op.get("ceil_mode", 0))
    if before != after or any(2 * pad > k for pad, k in zip(before, kernel, strict=True)):
        x, before = padded(net, x, (before, after), float("-inf")), [0] * rank
    return net.call(MAX_POOL[rank], x, kernel, stride=strides, padding=before, dilation=dilations, ceil_mode=ceil)


@operator("AveragePool")
def average_pool(net: Builder, op: Operator) -> fx.Node:
    x, kernel = net.tensor(op, 0), op.get("kernel_shape")
    rank = len(kernel)
    strides, dilations = op.get("strides", [1] * rank), op.get("dilations", [1] * rank)
    before, after = pads(net, op, x, kernel, strides, dilations)
    counted, ceil = bool(op.get("count_include_pad", 0)), bool(op.get("ceil_mode", 0))
    uneven = before != after or any(2 * pad > k for pad, k in zip(before, kernel, strict=True))
    if rank not in AVERAGE_POOL or set(dilations) != {1} or (uneven and ceil):
        raise UnsupportedError(f"{op} pools in another way")
    pool = AVERAGE_POOL[rank]
    if not uneven:
        return net.call(pool, x, kernel, stride=strides, padding=before, ceil_mode=ceil, count_include_pad=counted)
    y = net.call(pool, padded(net, x, (before, after), 0.0), kernel, stride=strides)
    if counted:
        return y
    flat = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    share = pool(F.pad(torch.ones(1, 1, *net.shape(x)[2:]), flat), kernel, stride=strides)
    return net.call(torch.div, y, net.attribute(f"{op.node.output[0]}_share", share.numpy(), trained=False))


@operator("GlobalAveragePool")
def global_average_pool(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    return net.call(torch.mean, x, list(range(2, net.rank(x))), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    return net.call(torch.amax, x, list(range(2, net.rank(x))), keepdim=True)


@operator("Gemm")
def gemm(net: Builder, op: Operator) -> fx.Node:
    alpha, beta = op.get("alpha", 1.0), op.get("beta", 1.0)
    x, weight = net.tensor(op, 0), net.value(op.node.input[1])
    if op.get("transA", 0):
        x = net.method("t", x)
    bias = net.value(op.node.input[2]) if net.given(op, 2) else Known.constant(np.zeros(0, np.float32))
    if isinstance(weight, Known) and isinstance(bias, Known) and _is_row(bias):
        matrix = weight.arrays[0] if op.get("transB", 0) else weight.arrays[0].T
        kind = matrix.dtype.type
        row = _row(bias.arrays[0] * kind(beta), len(matrix)) if net.given(op, 2) else None
        return linear(net, hint(op), x, matrix * kind(alpha), row)
    right = net.tensor(op, 1)
    y = net.call(torch.matmul, x, net.method("t", right) if op.get("transB", 0) else right)
    y = y if alpha == 1 else net.call(torch.mul, y, alpha)
    return net.call(torch.add, y, net.tensor(op, 2), alpha=beta) if net.given(op, 2) else y


def _is_row(value: Known) -> bool:
    """Whether it is the same for every row of a matrix."""
    return value.fixed and (value.arrays[0].ndim < 2 or value.arrays[0].shape[0] == 1)


def _row(array: Array, width: int) -> Array:
    found: Array = np.broadcast_to(array.reshape(-1), (width,))
    return found


def linear(net: Builder, path: str, x: fx.Node, matrix: Array, bias: Array | None) -> fx.Node:
    """A linear layer with `matrix` (out, in)."""
    module = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None)
    return net.module(path, filled(module, weight=matrix, bias=bias), x)


@operator("MatMul")
def matmul(net: Builder, op: Operator) -> fx.Node:
    right = net.value(op.node.input[1])
    left = net.value(op.node.input[0])
    if not (isinstance(right, Known) and right.fixed and right.arrays[0].ndim == 2 and isinstance(left, fx.Node)):
        return net.call(torch.matmul, net.tensor(op, 0), net.tensor(op, 1))
    matrix: Array = right.arrays[0].T
    bias, name, result = _bias_after(net, op, len(matrix))
    path = name.removesuffix(".bias") if name.endswith(".bias") else hint(op)
    y = linear(net, path, left, matrix, bias)
    net.values[result] = y
    return y


def _bias_after(net: Builder, op: Operator, width: int) -> tuple[Array | None, str, str]:
    """The row that the only user of a product adds to it, its name, and the name of the sum."""
    product = op.node.output[0]
    users = net.users.get(product, [])
    if len(users) == 1 and users[0].op_type == "Add" and product != net.file.output:
        other = next((str(name) for name in users[0].input if name != product), "")
        value = net.value(other) if other in net.values or other in net.weights else None
        if isinstance(value, Known) and value.fixed and value.arrays[0].shape == (width,):
            return value.arrays[0], other, users[0].output[0]
    return None, "", product


@operator("BatchNormalization")
def batch_norm(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    if net.rank(x) not in BATCH_NORM or op.get("training_mode", 0) or not op.get("spatial", 1):
        raise UnsupportedError(f"{op} is in training mode or of another form")
    weight, bias, mean, variance = (net.array(op, index) for index in range(1, 5))
    momentum = round(1 - op.get("momentum", 0.9), 6)
    module = BATCH_NORM[net.rank(x)](len(weight), eps=op.get("epsilon", 1e-5), momentum=momentum)
    state = filled(module, weight=weight, bias=bias, running_mean=mean, running_var=variance)
    return net.module(hint(op), state, x)


@operator("LayerNormalization")
def layer_norm(net: Builder, op: Operator) -> fx.Node:
    x, weight = net.tensor(op, 0), net.array(op, 1)
    shape = net.shape(x)[op.get("axis", -1) % net.rank(x) :]
    bias = np.broadcast_to(net.array(op, 2), shape) if net.given(op, 2) else None
    if len([name for name in op.node.output if name]) > 1:
        raise UnsupportedError(f"{op} also gives its statistics")
    module = nn.LayerNorm(shape, eps=op.get("epsilon", 1e-5), bias=bias is not None)
    return net.module(hint(op), filled(module, weight=np.broadcast_to(weight, shape), bias=bias), x)


@operator("GroupNormalization")
def group_norm(net: Builder, op: Operator) -> fx.Node:
    x, groups = net.tensor(op, 0), op.get("num_groups")
    channels = net.shape(x)[1]
    weight, bias = (np.repeat(array, channels // len(array)) for array in (net.array(op, 1), net.array(op, 2)))
    module = nn.GroupNorm(groups, channels, eps=op.get("epsilon", 1e-5))
    return net.module(hint(op), filled(module, weight=weight, bias=bias), x)


@operator("InstanceNormalization")
def instance_norm(net: Builder, op: Operator) -> fx.Node:
    x, weight, bias = net.tensor(op, 0), net.array(op, 1), net.array(op, 2)
    if net.rank(x) not in INSTANCE_NORM:
        raise UnsupportedError(f"{op} has {net.rank(x)} axes")
    module = INSTANCE_NORM[net.rank(x)](len(weight), eps=op.get("epsilon", 1e-5), affine=True)
    return net.module(hint(op), filled(module, weight=weight, bias=bias), x)


@operator("PRelu")
def prelu(net: Builder, op: Operator) -> fx.Node:
    x, slope = net.tensor(op, 0), net.array(op, 1)
    channels = net.shape(x)[1] if net.rank(x) > 1 else 1
    if slope.size != 1 and not (slope.size == channels and slope.shape[0] == channels):
        return net.call(torch.where, net.call(torch.gt, x, 0), x, net.call(torch.mul, x, net.tensor(op, 1)))
    if slope.ndim and slope.size != 1 and slope.ndim != net.rank(x) - 1:
        return net.call(torch.where, net.call(torch.gt, x, 0), x, net.call(torch.mul, x, net.tensor(op, 1)))
    return net.module(hint(op), filled(nn.PReLU(slope.size), weight=slope.reshape(-1)), x)


@operator("LRN")
def local_response_norm(net: Builder, op: Operator) -> fx.Node:
    size = op.get("size")
    if size % 2 == 0:
        raise UnsupportedError(f"{op} has an even size")
    alpha, beta, bias = op.get("alpha", 1e-4), op.get("beta", 0.75), op.get("bias", 1.0)
    return net.call(F.local_response_norm, net.tensor(op, 0), size, alpha, beta, bias)
