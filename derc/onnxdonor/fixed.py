"""From a model that derc exported itself to a torch module for its own, fixed shapes, which an engine compiles."""

from __future__ import annotations

from pathlib import Path

import onnx
from torch import fx

from derc.errors import DercError, UsageError
from derc.onnxdonor.builder import Builder
from derc.onnxdonor.file import OnnxFile
from derc.onnxdonor.network import OnnxNetwork, convert, opaque_nodes, quiet
from derc.onnxdonor.values import Operator

NAME = Path("the model")


def module(model: bytes) -> tuple[OnnxNetwork, tuple[int, ...]]:
    """The network of an ONNX `model` with one float32 input and one output, in eval mode, and its input's shape.

    Any number of axes, every size fixed; nothing is held against another runtime. Raises DercError where the bytes are
    no such model or have an operator without a PyTorch form.
    """
    file, shape = _file(model)
    builder = Builder(file, shape[1:], fixed=True)
    try:
        with quiet():
            for node in file.model.graph.node:
                if not all(name in builder.values for name in node.output if name):
                    version = file.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1)
                    convert(builder, Operator(node, version))
    except UsageError as error:
        raise DercError(f"{error}") from error
    network = OnnxNetwork(builder.root, _finished(builder), class_name="OnnxNetwork").eval()
    strange = sorted({node.kind for node in opaque_nodes(network)})
    if strange:
        raise DercError(f"{NAME} has operators without a PyTorch form ({', '.join(strange)}): use another engine")
    return network, shape


def _file(model: bytes) -> tuple[OnnxFile, tuple[int, ...]]:
    """The parsed model and the shape of its input."""
    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's errors differ between its implementations
        raise DercError(f"{NAME} is truncated or not ONNX: export it again") from error
    inputs, outputs = proto.graph.input, proto.graph.output
    if len(inputs) != 1 or len(outputs) != 1:
        raise DercError(f"{NAME} has {len(inputs)} inputs and {len(outputs)} outputs, and must have one of each")
    shape = tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)
    if not shape or not all(shape):
        raise DercError(f"{NAME} leaves a size of its input open ({shape}): export it with fixed shapes")
    return OnnxFile(NAME, proto, inputs[0].name, outputs[0].name, shape), shape


def _finished(builder: Builder) -> fx.Graph:
    """The graph with its output."""
    output = builder.values.get(builder.file.output)
    if not isinstance(output, fx.Node):
        raise DercError(f"{NAME} gives a constant, whatever its input is: check it")
    builder.graph.output(output)
    builder.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    builder.graph.lint()
    return builder.graph
