"""An operator without a PyTorch form, as a module that the ONNX runtime computes: no gradient, no source text."""

from __future__ import annotations

import base64
import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from derc.artifacts import Array
from derc.errors import UsageError
from derc.onnxdonor.builder import Builder
from derc.onnxdonor.runtime import Run, runner
from derc.onnxdonor.values import Operator

Types = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and dtype of each of several arrays."""
SIZED_BY_DATA = ("NonMaxSuppression", "NonZero", "Unique", "Compress")
_SIZED = "{path}: the size of what the operator {op} gives depends on the images: cut the network before it"
IR_VERSION = 10
"""Of models with a single operator: what every supported runtime reads."""


@cache
def _runner(source: str) -> Run:
    return runner(onnx.load_from_string(base64.b64decode(source)))


def _run(source: str, inputs: Sequence[Array]) -> list[Array]:
    return _runner(source)({f"in{place}": array for place, array in enumerate(inputs)})


@cache
def _types(source: str, inputs: Types) -> Types:
    """Shapes and dtypes of the outputs, by running the operator on zeros."""
    found = _run(source, [np.zeros(shape, dtype) for shape, dtype in inputs])
    return tuple((array.shape, str(array.dtype)) for array in found)


def _described(tensors: Sequence[Tensor]) -> Types:
    return tuple((tuple(int(n) for n in t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)


@torch.library.custom_op("derc::onnx_node", mutates_args=())
def onnx_node(inputs: list[Tensor], source: str) -> list[Tensor]:
    """Run the one operator in `source`, a model's bytes in base 64."""
    found = _run(source, [value.detach().cpu().contiguous().numpy() for value in inputs])
    return [torch.from_numpy(array.copy()) for array in found]


@onnx_node.register_fake
def _(inputs: list[Tensor], source: str) -> list[Tensor]:
    made = []
    for shape, dtype in _types(source, _described(inputs)):
        made.append(torch.empty(shape, dtype=getattr(torch, dtype)))
    return made


class OnnxNode(nn.Module):
    """The operator `label`; `source` computes its outputs from all its inputs, of which some are its own buffers."""

    def __init__(self, op: Operator, source: str, constants: dict[int, Array], outputs: list[str]) -> None:
        super().__init__()
        self.kind, self.version, self.source = op.kind, op.version, source
        self.places = [place for place, name in enumerate(op.node.input) if name]
        self.own = sorted(constants)
        self.outputs = len(outputs)
        for place, array in constants.items():
            self.register_buffer(f"input{place}", torch.from_numpy(np.array(array)))

    def forward(self, *given: Tensor) -> Any:
        rest = list(given)
        inputs = [getattr(self, f"input{place}") if place in self.own else rest.pop(0) for place in self.places]
        found = self._symbol(inputs) if torch.onnx.is_in_onnx_export() else onnx_node(inputs, self.source)
        return found[0] if self.outputs == 1 else tuple(found)

    def _symbol(self, inputs: list[Tensor]) -> Any:
        """What torch's exporter writes as the operator itself."""
        types = _types(self.source, _described(inputs))
        placed: list[Tensor | None] = [None] * (self.places[-1] + 1)
        for place, value in zip(self.places, inputs, strict=True):
            placed[place] = value
        domain, _, name = self.kind.rpartition("::")
        return torch.onnx.ops.symbolic_multi_out(
            f"{domain or 'ai.onnx'}::{name}",
            placed,
            {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in self._node.attribute},
            dtypes=[getattr(torch, dtype) for _, dtype in types],
            shapes=[shape for shape, _ in types],
            version=self.version if domain else None,
        )

    @property
    def _node(self) -> onnx.NodeProto:
        node: onnx.NodeProto = onnx.load_from_string(base64.b64decode(self.source)).graph.node[0]
        return node

    def check_exportable(self, opset: int) -> None:
        """Raise UsageError unless the operator means the same in the default domain's version `opset`."""
        domain, _, name = self.kind.rpartition("::")
        if not hasattr(torch.onnx, "ops"):
            raise UsageError(f"the operator {self.kind} cannot be exported by torch {torch.__version__}: update torch")
        if not domain:
            old, new = (onnx.defs.get_schema(name, version).since_version for version in (self.version, opset))
            if old != new:
                raise UsageError(
                    f"the operator {self.kind} of operator set {self.version} has no PyTorch form and cannot be "
                    f"profiled in operator set {opset}: convert the file with onnx.version_converter"
                )
        plain = (onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH, onnx.AttributeProto.SPARSE_TENSOR)
        if any(attribute.type in plain for attribute in self._node.attribute):
            raise UsageError(
                f"the operator {self.kind} has no PyTorch form and cannot be exported: leave the donor out"
            )


def opaque(net: Builder, op: Operator) -> list[fx.Node]:
    """The operator as a module; raises UsageError where no runtime computes it, or its shape hangs on the data."""
    if op.node.op_type in SIZED_BY_DATA:
        raise UsageError(_SIZED.format(path=net.file.path, op=op))
    names = list(op.node.input)
    constants, given = {}, []
    for place in [place for place, name in enumerate(names) if name]:
        value = net.value(names[place])
        if isinstance(value, fx.Node):
            given.append(value)
        else:
            constants[place] = net.array(op, place)
    outputs = [name for name in op.node.output if name]
    source = _source(net, op, constants, outputs)
    node = net.module(op.node.name or outputs[0], _checked(net, op, source, constants, given, outputs), *given)
    if len(outputs) == 1:
        return [node]
    return [net.call(operator.getitem, node, place) for place in range(len(outputs))]


def _source(net: Builder, op: Operator, constants: dict[int, Array], outputs: list[str]) -> str:
    """A model of the one operator in base 64."""
    node = onnx.NodeProto()
    node.CopyFrom(op.node)
    inputs: list[tuple[str, int]] = []
    for place, name in enumerate(op.node.input):
        if name:
            node.input[place] = f"in{len(inputs)}"
            value = net.value(name)
            kind = constants[place].dtype if place in constants else _dtype(value)
            inputs.append((node.input[place], onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))))
    graph = onnx.helper.make_graph(
        [node],
        op.kind,
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in net.file.opsets.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode()


def _dtype(node: Any) -> str:
    return str(node.meta["values"][0].dtype).removeprefix("torch.")


def _checked(
    net: Builder, op: Operator, source: str, constants: dict[int, Array], given: list[fx.Node], outputs: list[str]
) -> OnnxNode:
    """The module, where its outputs' shapes are the same on other data."""
    module = OnnxNode(op, source, constants, outputs)
    shapes = []
    try:
        for fill in (torch.zeros, torch.ones, torch.rand):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                found = module(*[fill(net.shape(n)).to(n.meta["values"][0].dtype) for n in given])
            shapes.append(_described([found] if len(outputs) == 1 else found))
    except Exception as error:  # runtimes raise errors of their own kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UsageError(
            f"{net.file.path}: the operator {op} has no PyTorch form, and the ONNX runtime does not compute it "
            f"({lines[0][:200]}): leave the donor out"
        ) from error
    if len(set(shapes)) > 1:
        raise UsageError(_SIZED.format(path=net.file.path, op=op))
    return module
