"""From torch to ONNX, and from one ONNX export to its blocks."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from derc.errors import DercError, UsageError
from derc.mode import in_eval
from derc.onnxdonor.opaque import OnnxNode

OPSET = 18
CLAMPS = (torch.clamp, torch.clamp_, torch.clip, torch.clip_, Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_)


class Chain(nn.Module):
    """Blocks in order; returns the value after each, so that one export holds every cut.

    Each value is cloned: a block that works in place (ReLU) would otherwise change the cut before it.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        cuts = []
        for block in self.blocks:
            x = block(x)
            cuts.append(x.clone())
        return tuple(cuts)


class Parallel(nn.Module):
    """Modules side by side, each with its own input and output, so that one export holds them all."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


class FlatAttention(TorchFunctionMode):
    """Attention over three axes, or five (windows), on four: the only number that the exporter knows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dim() == 4:
            return func(*args, **given)
        query, key, value, *rest = args
        mask = rest[0] if rest else given.get("attn_mask")
        if mask is not None:
            mask = _on_four_axes(mask.expand(*query.shape[:-1], key.shape[-2]))
        given = {**given, "attn_mask": mask}
        found: Tensor = func(_on_four_axes(query), _on_four_axes(key), _on_four_axes(value), *rest[1:], **given)
        return found.reshape(*query.shape[:-1], value.shape[-1])


def _on_four_axes(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-3:])


class EqualBounds(TorchFunctionMode):
    """Clamping between an integer and a real number, between two real ones: the exporter knows no mixed bounds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in CLAMPS:
            return func(*args, **given)
        bounds = [*args[1:], *(given.get(name) for name in ("min", "max"))]
        if any(isinstance(bound, float) for bound in bounds):
            args = (args[0], *map(_real, args[1:])) if args else args
            given = {name: _real(value) if name in ("min", "max") else value for name, value in given.items()}
        return func(*args, **given)


def _real(bound: Any) -> Any:
    return float(bound) if isinstance(bound, int) else bound


def versions() -> dict[str, str]:
    """What can change an export besides the network and derc's own code."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript")} | {"opset": str(OPSET)}


def export(
    module: nn.Module,
    examples: Tensor | tuple[Tensor, ...],
    output_names: Iterable[str],
    *,
    input_names: Iterable[str] = ("input",),
    name: str = "",
) -> bytes:
    """ONNX bytes of `module` in eval mode, static in the shapes of `examples`; equal modules give equal bytes.

    Raises UsageError, which calls the module `name` or by its type, where it cannot be exported.
    """
    name = name or type(module).__name__
    for part in module.modules():
        if isinstance(part, OnnxNode):
            part.check_exportable(OPSET)
    given = examples if isinstance(examples, tuple) else (examples,)
    inputs = tuple(x.clone() for x in given)  # torch makes one input of a tensor that is given twice
    try:
        with in_eval(module), _quiet(), torch.no_grad(), FlatAttention(), EqualBounds():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=list(input_names),
                output_names=list(output_names),
            )
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(f"{name} cannot be exported to ONNX: {_cause(error)}") from error
    if program is None:
        raise DercError("torch.onnx.export returned no program")
    proto = program.model_proto
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise UsageError(f"{name} cannot be exported to ONNX: it is larger than 2 GB in one file")
    return bytes(proto.SerializeToString(deterministic=True))


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".:")


def slice_model(model: bytes, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> bytes:
    """The part of `model` that computes `outputs` from `inputs`, with its own initializers and checked.

    Raises DercError where a value is unknown, or where `outputs` need more of the model's inputs than `inputs`.
    """
    return Slicer(model).slice(inputs, outputs)


class Slicer:
    """One parsed model, to be cut into many slices.

    An Identity is an alias: all names of one value are replaced by the first, so that a cut is found wherever the
    exporter put its copy.
    """

    def __init__(self, model: bytes) -> None:
        self.model = onnx.load_from_string(model)
        graph = self.model.graph
        self.root: dict[str, str] = {}
        for node in graph.node:
            if node.op_type == "Identity" and not node.domain:
                self.root[node.output[0]] = self.root.get(node.input[0], node.input[0])
        self.producer = {name: node for node in graph.node for name in node.output if name and name not in self.root}
        self.position = {id(node): place for place, node in enumerate(graph.node)}
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.types: dict[str, onnx.TypeProto] = {}
        for info in (*graph.value_info, *graph.input, *graph.output):
            self.types[self._first(info.name)] = info.type

    def slice(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> bytes:
        """See `slice_model`."""
        names = {self._first(name): name for name in inputs}
        for name in (*inputs, *outputs):
            if self._first(name) not in self.types:
                raise DercError(f"the exported model has no value {name!r}")
        nodes, weights = self._needed(set(names), [self._first(name) for name in outputs])
        body = [self._renamed(node, names) for node in nodes]
        copies = []
        for name in outputs:
            source = names.get(self._first(name), self._first(name))
            if source != name:
                copies.append(onnx.helper.make_node("Identity", [source], [name], name=f"slice_output_{name}"))
        result = onnx.ModelProto(ir_version=self.model.ir_version, producer_name="derc")
        result.opset_import.extend(self.model.opset_import)
        result.functions.extend(self.model.functions)
        result.graph.name = "slice"
        result.graph.node.extend(body + copies)
        result.graph.input.extend(self._infos(inputs))
        result.graph.output.extend(self._infos(outputs))
        result.graph.initializer.extend(self.weights[name] for name in weights)
        data = bytes(result.SerializeToString(deterministic=True))
        onnx.checker.check_model(data)
        return data

    def _infos(self, names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
        return [onnx.ValueInfoProto(name=name, type=self.types[self._first(name)]) for name in names]

    def _first(self, name: str) -> str:
        return self.root.get(name, name)

    def _needed(self, given: set[str], wanted: list[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """Nodes, in the model's order, and initializers that lead from the `given` values to the `wanted`."""
        seen, nodes, weights, stack = set(given), dict[int, onnx.NodeProto](), set[str](), list(wanted)
        while stack:
            name = stack.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            if name in self.producer:
                node = self.producer[name]
                nodes[self.position[id(node)]] = node
                stack.extend(self._first(used) for used in _used(node))
            elif name in self.weights:
                weights.add(name)
            else:
                raise DercError(f"the slice up to {', '.join(wanted)} also needs {name!r} from before its start")
        return [nodes[place] for place in sorted(nodes)], sorted(weights)

    def _renamed(self, node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
        """A copy of `node` that uses first names, and for the slice's inputs the names asked for."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        self._rename(copy, names)
        return copy

    def _rename(self, node: onnx.NodeProto, names: dict[str, str]) -> None:
        for place, name in enumerate(node.input):
            first = self._first(name)
            node.input[place] = names.get(first, first)
        for body in _bodies(node):
            for inner in body.node:
                self._rename(inner, names)


def join(models: Iterable[bytes], input_name: str = "input", output_name: str = "output") -> bytes:
    """One model that runs `models` in turn, each with one input and one output, under the names given.

    Raises DercError where a model has more of either, or where two ask for different versions of one operator set.
    """
    result = onnx.ModelProto(producer_name="derc")
    result.graph.name = "joined"
    value, opsets, functions = input_name, dict[str, int](), dict[tuple[str, str], onnx.FunctionProto]()
    parts = [onnx.load_from_string(model) for model in models]
    for place, part in enumerate(parts):
        if len(part.graph.input) != 1 or len(part.graph.output) != 1:
            raise DercError(f"model {place} has not one input and one output: it cannot be joined to others")
        names = {part.graph.input[0].name: value}
        value = names[part.graph.output[0].name] = output_name if part is parts[-1] else f"joint{place}"
        _prefix(part.graph, f"part{place}/", names)
        result.ir_version = max(result.ir_version, part.ir_version)
        for opset in part.opset_import:
            if opsets.setdefault(opset.domain, opset.version) != opset.version:
                raise DercError(f"models of operator sets {opsets[opset.domain]} and {opset.version} cannot be joined")
        functions |= {(function.domain, function.name): function for function in part.functions}
        result.graph.node.extend(part.graph.node)
        result.graph.initializer.extend(part.graph.initializer)
    result.graph.input.append(parts[0].graph.input[0])
    result.graph.output.append(parts[-1].graph.output[0])
    result.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items())
    result.functions.extend(functions.values())
    data = bytes(result.SerializeToString(deterministic=True))
    onnx.checker.check_model(data)
    return data


def _prefix(graph: onnx.GraphProto, prefix: str, names: dict[str, str]) -> None:
    """Rename every value of `graph` in place, to what `names` says or else to its name with `prefix` before it."""

    def renamed(name: str) -> str:
        return name and names.get(name, prefix + name)

    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        for body in _bodies(node):
            _prefix(body, prefix, names)
    for item in (*graph.initializer, *graph.input, *graph.output):
        item.name = renamed(item.name)
    del graph.value_info[:]


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs inside a node (If, Loop)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _used(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its inner graphs capture included."""
    used = set(node.input)
    for body in _bodies(node):
        local = {name for inner in body.node for name in inner.output}
        local |= {value.name for value in (*body.input, *body.initializer)}
        read = {name for inner in body.node for name in _used(inner)} | {value.name for value in body.output}
        used |= read - local
    return used


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter off the terminal; errors are exceptions and pass."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        drain = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(drain), contextlib.redirect_stderr(drain):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
