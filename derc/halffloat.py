"""16-bit floating point by rewriting ONNX: the insides in fp16 or bf16, the input and output in float32 as before."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from derc.artifacts import Array
from derc.errors import PrecisionError

KEPT = (
    "CumSum",
    "Exp",
    "GridSample",
    "Log",
    "Pow",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceSum",
    "ReduceSumSquare",
    "Resize",
)
"""Operators that stay in float32: what they sum or raise soon leaves the range, or they take float32 operands only."""

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
OPSETS = {"fp16": 13, "bf16": 22}
"""The oldest ONNX operator set whose convolutions take the type."""
LIMITS = {"fp16": 65504.0, "bf16": 3.3895e38}
MASK = -1e30
"""A constant below this stands for minus infinity."""


def rewrite(model: bytes, precision: str, kept: tuple[str, ...] = KEPT) -> bytes:
    """`model` with float32 input and output, computed in `precision` (fp16, bf16) but for the operators `kept`.

    Raises PrecisionError where a weight is beyond the range, or an operator is not defined for the type.
    """
    proto = inliner.inline_local_functions(onnx.load_from_string(model))
    if any(attribute.type == onnx.AttributeProto.GRAPH for node in proto.graph.node for attribute in node.attribute):
        raise PrecisionError(f"control flow (If, Loop, Scan) cannot be rewritten to {precision}: keep this block fp32")
    proto = onnx.shape_inference.infer_shapes(_raised(proto, OPSETS[precision]), data_prop=True)
    _Rewriting(proto.graph, precision, kept).run()
    data = bytes(proto.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        line = str(error).strip().splitlines()[0]
        raise PrecisionError(
            f"ONNX does not allow {precision} everywhere here ({line}): keep this block fp32"
        ) from error
    return data


def halved(name: str, weights: Array, precision: str) -> Array:
    """`weights` in the type of `precision`; raises PrecisionError where one is beyond its range."""
    limit = LIMITS[precision]
    bounded = np.where(weights <= MASK, np.float32(-limit), weights)
    if bool((np.abs(bounded[np.isfinite(bounded)]) > limit).any()):
        raise PrecisionError(f"the weight {name} is beyond the range of {precision} ({limit:.4g}): keep its block fp32")
    found: Array = bounded.astype(helper.tensor_dtype_to_np_dtype(TYPES[precision]))
    return found


def _raised(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """`proto` in an operator set no older than `opset`."""
    current = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return proto if current >= opset else onnx.version_converter.convert_version(proto, opset)


@dataclass
class _Rewriting:
    """One pass over a graph in its order; `native` is the type that each float value now has."""

    graph: onnx.GraphProto
    precision: str
    kept: tuple[str, ...]
    native: dict[str, int] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    made: dict[tuple[str, int], str] = field(default_factory=dict)

    def run(self) -> None:
        infos = (*self.graph.input, *self.graph.value_info, *self.graph.output)
        floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.weights = {w.name: w for w in self.graph.initializer if w.data_type == TensorProto.FLOAT}
        self.native = dict.fromkeys((*self.weights, *(given.name for given in self.graph.input)), TensorProto.FLOAT)
        for node in self.graph.node:
            self._convert(node, floats)
        self._restore_outputs(floats)
        for info in self.graph.value_info:
            if info.name in self.native:
                info.type.tensor_type.elem_type = self.native[info.name]
        used = {name for node in self.nodes for name in node.input} | {info.name for info in self.graph.output}
        weights = [weight for weight in self.graph.initializer if weight.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(weights)

    def _convert(self, node: onnx.NodeProto, floats: set[str]) -> None:
        half = TYPES[self.precision]
        want = TensorProto.FLOAT if self._stays(node) else half
        for place, name in enumerate(node.input):
            if name in floats or name in self.weights:
                node.input[place] = self._as(name, want)
        if want == half:
            _retype(node, half, self.precision)
        for name in node.output:
            if name in floats:
                self.native[name] = want
        self.nodes.append(node)

    def _stays(self, node: onnx.NodeProto) -> bool:
        """Whether a node is computed in float32: also a constant that is written as a plain number."""
        plain = node.op_type == "Constant" and node.attribute[0].name != "value"
        return bool(node.domain) or node.op_type in self.kept or plain

    def _as(self, name: str, want: int) -> str:
        """The name of `name`'s value in the type `want`, made once."""
        if self.native[name] == want:
            return name
        if (name, want) not in self.made:
            self.made[name, want] = f"{name}/{TensorProto.DataType.Name(want).lower()}"
            if name in self.weights:
                self._halve(name, self.made[name, want])
            else:
                self.nodes.append(_cast(name, self.made[name, want], want))
        return self.made[name, want]

    def _halve(self, name: str, target: str) -> None:
        array = halved(name, numpy_helper.to_array(self.weights[name]), self.precision)
        self.graph.initializer.append(numpy_helper.from_array(array, target))

    def _restore_outputs(self, floats: set[str]) -> None:
        """Give every graph output its name and float32 back."""
        for info in self.graph.output:
            if info.name not in floats or self.native[info.name] == TensorProto.FLOAT:
                continue
            inner = f"{info.name}/{self.precision}"
            for node in self.nodes:
                _rename(node, info.name, inner)
            self.nodes.append(_cast(inner, info.name, TensorProto.FLOAT))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast:{target}", to=kind)


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    for names in (node.input, node.output):
        for place, name in enumerate(names):
            if name == old:
                names[place] = new


def _retype(node: onnx.NodeProto, half: int, precision: str) -> None:
    """Constants and types that the node holds as attributes, from float32 to `half`."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = half
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            array = halved(node.output[0], numpy_helper.to_array(attribute.t), precision)
            attribute.t.CopyFrom(numpy_helper.from_array(array))
