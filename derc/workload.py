"""What a part of a network asks of a device: operators, multiply-accumulates and bytes, counted in its ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import onnx

from derc import stitching
from derc.exporting import Slicer
from derc.ir import TensorType
from derc.stitching import PLAIN, Form

FREE = frozenset(
    ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Constant", "ConstantOfShape", "Dropout")
    + ("BatchNormalization", "Cast", "Relu", "Clip")
)
"""Operators that move nothing: views, and what every engine folds into the operator before it."""
FLOAT_BYTES = 4
STITCH_KERNELS = 2
"""A stitch regrids or permutes, then maps."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Of one call, its batch included: `macs` of products and dense or grouped convolutions, `depthwise` those of
    depthwise ones, `bytes` read and written by all `kernels` in float32, weights included.
    """

    kernels: int = 0
    macs: int = 0
    depthwise: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.kernels + other.kernels,
            self.macs + other.macs,
            self.depthwise + other.depthwise,
            self.bytes + other.bytes,
        )


def model_work(model: bytes) -> Work:
    """Work of one run of a whole ONNX model of static shapes."""
    slicer = Slicer(model)
    inputs = tuple(value.name for value in slicer.model.graph.input)
    outputs = tuple(value.name for value in slicer.model.graph.output)
    return slice_work(slicer, inputs, outputs)


def slice_work(slicer: Slicer, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Work:
    """Work of what `slicer` cuts out between the values named; raises DercError as it does."""
    model = onnx.load_from_string(slicer.slice(inputs, outputs))
    shapes = {name: _shape(kind) for name, kind in slicer.types.items()}
    shapes |= {value.name: _shape(value.type) for value in (*model.graph.input, *model.graph.output)}
    weights = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    return total(_node_work(node, shapes, weights) for node in model.graph.node)


def stitch_work(source: TensorType, target: TensorType, batch: int = 1, form: Form = PLAIN) -> Work:
    """Work of the stitch between two types."""
    if stitching.free(source, target, form):
        return Work()
    cost = stitching.cost(source, target, form)
    moved = batch * stitching.moved(source, target, form) + cost.params
    return Work(kernels=STITCH_KERNELS + (form.rank > 0), macs=batch * cost.macs, bytes=FLOAT_BYTES * moved)


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    found = Work()
    for work in works:
        found += work
    return found


def _shape(kind: onnx.TypeProto) -> Shape:
    return tuple(axis.dim_value for axis in kind.tensor_type.shape.dim)


def _node_work(node: onnx.NodeProto, shapes: Mapping[str, Shape], weights: Mapping[str, Shape]) -> Work:
    """Work of one operator; none where it is free or works on constants alone."""
    data = [name for name in node.input if name in shapes and name not in weights]
    if node.op_type in FREE or not data:
        return Work()
    results = [shapes[name] for name in node.output if name in shapes]
    read = sum(prod(shapes[name]) for name in data) + sum(prod(weights[name]) for name in node.input if name in weights)
    moved = FLOAT_BYTES * (read + sum(map(prod, results)))
    macs, depthwise = _macs(node, results[0] if results else (), {**shapes, **weights})
    return Work(1, 0 if depthwise else macs, macs if depthwise else 0, moved)


def _macs(node: onnx.NodeProto, result: Shape, shapes: Mapping[str, Shape]) -> tuple[int, bool]:
    """Multiply-accumulates of an operator and whether it is a depthwise convolution."""
    if node.op_type == "Conv":
        kernel = shapes[node.input[1]]
        return prod(result) * prod(kernel[1:]), kernel[1] == 1 and kernel[0] > 1 and len(kernel) > 2
    if node.op_type in ("MatMul", "Gemm"):
        left = shapes[node.input[0]]
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return prod(result) * (left[0] if transposed else left[-1]), False
    return 0, False
