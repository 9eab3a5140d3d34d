"""From an ONNX file to a torch network that gives what ONNX Runtime gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx

from derc.artifacts import Array
from derc.errors import DercError, ParityError, UsageError
from derc.onnxdonor import elementwise, layers, resizing, shaping
from derc.onnxdonor.builder import Builder
from derc.onnxdonor.file import read
from derc.onnxdonor.opaque import OnnxNode, opaque
from derc.onnxdonor.runtime import runner
from derc.onnxdonor.tables import OPERATORS
from derc.onnxdonor.values import FACTORS, Known, Operator, UnsupportedError, folded

TOLERANCE = 1e-4
"""Allowed difference from ONNX Runtime, as a share of the largest output (at least 1)."""
TABLES = (elementwise, layers, resizing, shaping)
"""The modules that fill the table of operators when they are imported."""


class OnnxNetwork(fx.GraphModule):
    """A network built from an ONNX file: torch's own modules, parameters and functions, and `OnnxNode` for the rest."""


def build(path: Path, input_size: Sequence[int] | None = None) -> OnnxNetwork:
    """The network in `path` for images (C, H, W), any number of them at a time, held against ONNX Runtime.

    Raises UsageError where the file is damaged or no such network, ParityError where torch computes otherwise.
    """
    file = read(path)
    builder = Builder(file, file.size(tuple(input_size) if input_size else None))
    with quiet():
        for node in file.model.graph.node:
            if not all(name in builder.values for name in node.output if name):
                convert(builder, Operator(node, file.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1)))
    network = OnnxNetwork(builder.root, _finished(builder), class_name="OnnxNetwork").eval()
    check_parity(network, builder)
    return network


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from writing a traceback where shapes do not fit: that becomes an error of one sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def opaque_nodes(network: torch.nn.Module) -> list[OnnxNode]:
    """The operators of a network that have no PyTorch form."""
    return [module for module in network.modules() if isinstance(module, OnnxNode)]


def remark_of(network: torch.nn.Module) -> str:
    """What is to be said of a donor whose blocks cannot all be written as PyTorch; empty where they can."""
    kinds = sorted({node.kind for node in opaque_nodes(network)})
    return f"{', '.join(kinds)}: no PyTorch form, so blocks with it are profiled but not emitted" if kinds else ""


def convert(builder: Builder, op: Operator) -> None:
    """Add one operator; raises UsageError naming it where that cannot be done."""
    path = builder.file.path
    try:
        made = _made(builder, op)
    except UnsupportedError as error:
        raise UsageError(f"{path}: {error}, which derc does not follow: leave the donor out") from error
    except DercError as error:
        raise error if str(path) in str(error) else UsageError(f"{path}: {error}") from error
    except Exception as error:  # torch raises errors of many kinds where shapes do not fit
        lines = str(error).strip().splitlines() or [type(error).__name__]
        batch = "" if builder.free else "; its batch size is fixed: export it with a free batch axis"
        raise UsageError(f"{path}: the operator {op} does not fit its inputs ({lines[0]}){batch}") from error
    for name, value in zip(op.node.output, made, strict=False):
        if name and name not in builder.values:
            builder.values[name] = value


def _made(builder: Builder, op: Operator) -> Sequence[Known | fx.Node]:
    """The operator's outputs: constants folded, else its entry in the table, else the runtime's own."""
    values = {name: builder.value(name) for name in op.node.input if name}
    known = {name: value for name, value in values.items() if isinstance(value, Known)}
    if len(known) == len(values):
        constants = folded(op, known, builder.file.opsets)
        if constants is not None:
            return constants
    elif op.kind in ("Shape", "Size"):
        return [_shape(builder, op)]
    handler = OPERATORS.get(op.kind)
    if handler is not None:
        try:
            made = handler(builder, op)
        except UnsupportedError:
            if len(known) == len(values):
                raise
        else:
            return made if isinstance(made, list) else [made]
    return opaque(builder, op)


def _shape(builder: Builder, op: Operator) -> Known:
    """A tensor's shape, or a part of it, or its number of elements."""
    x, span = builder.tensor(op, 0), slice(op.get("start", 0), op.get("end"))
    shapes = [np.array(shape, np.int64) for shape in builder.shapes(x)]
    if op.kind == "Size":
        shapes = [np.array(shape.prod(), np.int64) for shape in shapes]
    else:
        shapes = [shape[span] for shape in shapes]
    return Known(tuple(shapes), source=x)


def _finished(builder: Builder) -> fx.Graph:
    """The graph with its output; raises UsageError unless that has the images' batch axis."""
    path, output = builder.file.path, builder.values.get(builder.file.output)
    if not isinstance(output, fx.Node):
        raise UsageError(f"{path} gives a constant, whatever the images are: check the file")
    shapes = builder.shapes(output)
    if not shapes[0] or any(s[0] != builder.batch * f for s, f in zip(shapes, FACTORS, strict=True)):
        raise UsageError(f"{path} does not give one row for each image: export it with a free batch axis")
    builder.graph.output(output)
    builder.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    builder.graph.lint()
    return builder.graph


@torch.no_grad()
def check_parity(network: fx.GraphModule, builder: Builder) -> None:
    """Raise ParityError, naming the first operator that differs, unless the network gives what ONNX Runtime gives."""
    file = builder.file
    x = torch.randn(FACTORS[-1] * builder.batch, *builder.shape(builder.images)[1:], generator=_generator())
    chunks = [x] if builder.free else torch.split(x, builder.batch)
    try:
        run = runner(file.model)
        want = np.concatenate([run({file.input: chunk.numpy()})[0] for chunk in chunks])
    except Exception as error:  # runtimes raise errors of their own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{file.path} does not run in ONNX Runtime: {lines[0][:200]}; export it again") from error
    got = network(x.clone()).numpy()
    if not _differs(want, got):
        return
    first = _first_difference(network, builder, chunks[0])
    raise ParityError(
        f"{file.path} gives another result in PyTorch than in ONNX Runtime, {first or 'on a larger batch only'}: "
        "leave the donor out and report it"
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _differs(want: Array, got: Array) -> bool:
    if want.shape != got.shape:
        return True
    difference = np.abs(want.astype(np.float64) - got.astype(np.float64)).max(initial=0.0)
    return not difference <= TOLERANCE * max(1.0, float(np.abs(want).max(initial=0.0)))


def _first_difference(network: fx.GraphModule, builder: Builder, x: torch.Tensor) -> str:
    """A clause about the first operator whose output differs; empty where none does."""
    made = {node.name for node in network.graph.nodes}
    names = {
        name: value.name
        for node in builder.file.model.graph.node
        for name in node.output
        if isinstance(value := builder.values.get(name), fx.Node) and value.name in made
    }
    model = onnx.ModelProto()
    model.CopyFrom(builder.file.model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    want = dict(zip(names, runner(model)({builder.file.input: x.numpy()}), strict=True))
    got = _every_value(network, x)
    for node in builder.file.model.graph.node:
        for name in node.output:
            if name in names and _differs(want[name], got[names[name]]):
                return f"from the operator {Operator(node, 0)} on"
    return ""


def _every_value(network: fx.GraphModule, x: torch.Tensor) -> Mapping[str, Array]:
    """What every node of the network gives, by its name."""
    found: dict[str, Array] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                found[n.name] = value.detach().numpy()
            return value

    Recorder(network).run(x)
    return found
