"""Operators that work element by element, and reductions along axes."""

from __future__ import annotations

import math
import operator as plain
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import fx

from derc.onnxdonor.builder import Builder, check_batch
from derc.onnxdonor.tables import OPERATORS, operator
from derc.onnxdonor.values import Operator, UnsupportedError, as_tensor

UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
ARITHMETIC: dict[str, Callable[..., Any]] = {"Add": plain.add, "Sub": plain.sub, "Mul": plain.mul}
"""Functions that take a number on either side."""
COMPARISONS: dict[str, Callable[..., Any]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
"""Functions that take a number on the right side."""
CHAINED: dict[str, Callable[..., Any]] = {
    "And": torch.logical_and,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Or": torch.logical_or,
    "Sum": plain.add,
    "Xor": torch.logical_xor,
}
"""Functions of two tensors, one after the other where there are more."""
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceSum": torch.sum,
}

COMPOSED: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "ReduceL1": (torch.abs, None),
    "ReduceL2": (torch.square, torch.sqrt),
    "ReduceLogSum": (None, torch.log),
    "ReduceSumSquare": (torch.square, None),
}
"""What is done before and after a sum."""
ALONG_ONE: dict[str, Any] = {"ArgMax": torch.argmax, "ArgMin": torch.argmin, "ReduceProd": torch.prod}


def _unary(net: Builder, op: Operator) -> fx.Node:
    return net.call(UNARY[op.kind], net.tensor(op, 0))


def _arithmetic(net: Builder, op: Operator) -> fx.Node:
    return net.call(ARITHMETIC[op.kind], net.operand(op, 0), net.operand(op, 1))


def _compare(net: Builder, op: Operator) -> fx.Node:
    return net.call(COMPARISONS[op.kind], net.tensor(op, 0), net.operand(op, 1))


def _chain(net: Builder, op: Operator) -> fx.Node:
    total = net.tensor(op, 0)
    for index in range(1, len(op.node.input)):
        total = net.call(CHAINED[op.kind], total, net.tensor(op, index))
    return total


OPERATORS.update(dict.fromkeys(UNARY, _unary))
OPERATORS.update(dict.fromkeys(ARITHMETIC, _arithmetic))
OPERATORS.update(dict.fromkeys(COMPARISONS, _compare))
OPERATORS.update(dict.fromkeys(CHAINED, _chain))


@operator("Mean")
def mean(net: Builder, op: Operator) -> fx.Node:
    total = net.tensor(op, 0)
    for index in range(1, len(op.node.input)):
        total = net.call(plain.add, total, net.tensor(op, index))
    return net.call(plain.truediv, total, len(op.node.input))


@operator("Div")
def divide(net: Builder, op: Operator) -> fx.Node:
    left, right = net.operand(op, 0), net.operand(op, 1)
    whole = any(isinstance(side, fx.Node) and not side.meta["values"][0].is_floating_point() for side in (left, right))
    if whole:
        return net.call(torch.div, net.tensor(op, 0), right, rounding_mode="trunc")
    return net.call(plain.truediv, left, right)


@operator("Mod")
def modulo(net: Builder, op: Operator) -> fx.Node:
    return net.call(torch.fmod if op.get("fmod", 0) else torch.remainder, net.tensor(op, 0), net.operand(op, 1))


@operator("Pow")
def power(net: Builder, op: Operator) -> fx.Node:
    return net.call(torch.pow, net.operand(op, 0), net.operand(op, 1))


@operator("Where")
def where(net: Builder, op: Operator) -> fx.Node:
    return net.call(torch.where, net.tensor(op, 0), net.tensor(op, 1), net.tensor(op, 2))


@operator("Cast")
def cast(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    try:
        kind = as_tensor(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(op.get("to")))).dtype
    except TypeError as error:
        raise UnsupportedError(f"{op} casts to a type that torch does not have") from error
    return x if x.meta["values"][0].dtype == kind else net.method("to", x, kind)


@operator("Clip")
def clip(net: Builder, op: Operator) -> fx.Node:
    bounds: list[float | None] = []
    for index, name in enumerate(("min", "max"), start=1):
        found = op.get(name)
        if found is None and net.given(op, index):
            found = net.array(op, index).reshape(()).item()
        bounds.append(found)
    x = net.tensor(op, 0)
    return x if bounds == [None, None] else net.call(torch.clamp, x, *bounds)


@operator("LeakyRelu")
def leaky_relu(net: Builder, op: Operator) -> fx.Node:
    return net.call(F.leaky_relu, net.tensor(op, 0), op.get("alpha", 0.01))


@operator("Elu")
def elu(net: Builder, op: Operator) -> fx.Node:
    return net.call(F.elu, net.tensor(op, 0), op.get("alpha", 1.0))


@operator("Celu")
def celu(net: Builder, op: Operator) -> fx.Node:
    return net.call(F.celu, net.tensor(op, 0), op.get("alpha", 1.0))


@operator("Selu")
def selu(net: Builder, op: Operator) -> fx.Node:
    if "alpha" in [attribute.name for attribute in op.node.attribute] or op.get("gamma") is not None:
        raise UnsupportedError(f"{op} has its own constants")
    return net.call(F.selu, net.tensor(op, 0))


@operator("HardSwish")
def hard_swish(net: Builder, op: Operator) -> fx.Node:
    return net.call(F.hardswish, net.tensor(op, 0))


@operator("HardSigmoid")
def hard_sigmoid(net: Builder, op: Operator) -> fx.Node:
    x, alpha, beta = net.tensor(op, 0), op.get("alpha", 0.2), op.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return net.call(F.hardsigmoid, x)
    return net.call(torch.clamp, net.call(plain.add, net.call(plain.mul, x, alpha), beta), 0.0, 1.0)


@operator("ThresholdedRelu")
def thresholded_relu(net: Builder, op: Operator) -> fx.Node:
    return net.call(F.threshold, net.tensor(op, 0), op.get("alpha", 1.0), 0.0)


@operator("Gelu")
def gelu(net: Builder, op: Operator) -> fx.Node:
    return net.call(F.gelu, net.tensor(op, 0), approximate=op.get("approximate", "none"))


@operator("Softmax", "LogSoftmax")
def softmax(net: Builder, op: Operator) -> fx.Node:
    """Before version 13 over all axes from `axis` on, as one."""
    function = torch.softmax if op.kind == "Softmax" else torch.log_softmax
    x = net.tensor(op, 0)
    axis = op.get("axis", -1 if op.version >= 13 else 1) % net.rank(x)
    check_batch(net, op, x, [axis])
    if op.version >= 13 or axis == net.rank(x) - 1:
        return net.call(function, x, axis)
    shape = net.shape(x)[axis:]
    return net.method("unflatten", net.call(function, net.call(torch.flatten, x, axis), axis), axis, list(shape))


def axes_of(net: Builder, op: Operator, x: fx.Node) -> list[int]:
    """The axes that a reduction goes along, all of them where none are given."""
    axes = net.integers(op, "axes", 1)
    if not axes:
        axes = [] if op.get("noop_with_empty_axes", 0) else list(range(net.rank(x)))
    check_batch(net, op, x, axes)
    return axes


@operator(*REDUCTIONS)
def reduce(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    axes = axes_of(net, op, x)
    return net.call(REDUCTIONS[op.kind], x, axes, keepdim=bool(op.get("keepdims", 1))) if axes else x


@operator(*COMPOSED)
def reduce_composed(net: Builder, op: Operator) -> fx.Node:
    x = net.tensor(op, 0)
    axes, (inner, outer) = axes_of(net, op, x), COMPOSED[op.kind]
    if not axes:
        raise UnsupportedError(f"{op} reduces no axis")
    total = net.call(torch.sum, net.call(inner, x) if inner else x, axes, keepdim=bool(op.get("keepdims", 1)))
    return net.call(outer, total) if outer else total


@operator(*ALONG_ONE)
def reduce_one(net: Builder, op: Operator) -> fx.Node:
    x, keep = net.tensor(op, 0), bool(op.get("keepdims", 1))
    axes = axes_of(net, op, x) if op.kind == "ReduceProd" else [op.get("axis", 0)]
    check_batch(net, op, x, axes)
    if len(axes) != 1 or op.get("select_last_index", 0):
        raise UnsupportedError(f"{op} reduces several axes")
    return net.call(ALONG_ONE[op.kind], x, axes[0], keepdim=keep)


@operator("LpNormalization")
def lp_normalize(net: Builder, op: Operator) -> fx.Node:
    x, axis = net.tensor(op, 0), op.get("axis", -1)
    check_batch(net, op, x, [axis])
    return net.call(F.normalize, x, float(op.get("p", 2)), axis, 0.0)


@operator("CumSum")
def cumulative_sum(net: Builder, op: Operator) -> fx.Node:
    x, axis = net.tensor(op, 0), int(net.array(op, 1).reshape(()))
    check_batch(net, op, x, [axis])
    if op.get("exclusive", 0) or op.get("reverse", 0):
        raise UnsupportedError(f"{op} is exclusive or reversed")
    return net.call(torch.cumsum, x, axis)


@operator("Einsum")
def einsum(net: Builder, op: Operator) -> fx.Node:
    return net.call(torch.einsum, op.get("equation"), *[net.tensor(op, i) for i in range(len(op.node.input))])
