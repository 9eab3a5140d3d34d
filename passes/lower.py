"""lower: trace a network into a typed graph over its own submodules, shapes folded to constants, batch size free."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from derc.artifacts import LoweredZoo, digest
from derc.errors import DercError, UsageError
from derc.ir import Graph, Layout, Op, TensorType, Value, scaled
from derc.layouts import Axes, Grid, follow, target_name
from derc.lowered import Call, Lowered
from derc.modules import Normalize
from derc.pipeline import Context
from derc.tracing import BATCHES, ModeBranchError, ShapeTracer, is_batched, is_count

NORMALIZE = "derc_normalize"


@dataclass(frozen=True)
class Lower:
    """Reads the live donors, which the context traces on demand, and keeps their graphs."""

    name: ClassVar[str] = "lower"
    produces: ClassVar[type] = LoweredZoo

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors])

    def run(self, context: Context) -> LoweredZoo:
        names = context.console.track(context.zoo.names, "lower", len(context.zoo.names))
        return LoweredZoo({name: context.lowered[name].graph for name in names})


def lower(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    name: str = "network",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Lowered:
    """Trace `module` for images of `input_shape` (C, H, W); with `mean` and `std`, normalisation becomes its first op.

    Raises UsageError where the forward pass depends on the data or the traced program is not exactly the module.
    """
    training = module.training
    module.eval()
    try:
        tracer, graph = _trace(module, input_shape)
    except DercError as error:
        raise UsageError(f"donor {name} cannot be lowered: {error}") from error
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError) as error:
        raise UsageError(f"donor {name} cannot be traced for input {input_shape}: {_first_line(error)}") from error
    localise_counts(graph)
    program = fx.GraphModule(_live(module, tracer.root, graph), graph)
    graph.eliminate_dead_code()
    if mean is not None and std is not None and (any(mean) or any(s != 1 for s in std)):
        _insert_normalize(program, mean, std)
    program.recompile()
    typed = _graph(program, name)
    typed.verify()
    lowered = Lowered(module, program, typed, _calls(tracer, graph))
    _check_exact(lowered, input_shape, normalized=NORMALIZE in typed.types)
    module.train(training)
    program.train(training)
    return lowered


def _trace(module: nn.Module, input_shape: tuple[int, int, int]) -> tuple[ShapeTracer, fx.Graph]:
    """Trace a copy, anew with every type of module that turns out to branch on its training mode kept whole."""
    whole: frozenset[type] = frozenset()
    while True:
        tracer = ShapeTracer(input_shape, whole)
        try:
            return tracer, tracer.trace(copy.deepcopy(module))
        except ModeBranchError as branch:
            whole |= {branch.owner}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _live(module: nn.Module, traced: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """What the graph refers to: the module's own submodules and parameters, and the constants that tracing made.

    Tracing runs on a copy, because some networks keep what they computed, and here that would be shapes without data.
    """
    found = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            owner = traced if target.startswith("_tensor_constant") else module
            found[target] = operator.attrgetter(target)(owner)
    return found


def localise_counts(graph: fx.Graph) -> None:
    """Re-derive every batch-dependent number from an operand of its user, so that it ties no distant parts together."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or is_count(node):
            continue
        anchor = next((n for n in node.all_input_nodes if is_batched(n)), None)
        if anchor is None:
            continue
        for count in [n for n in node.all_input_nodes if is_count(n)]:
            if anchor in count.all_input_nodes and count.op == "call_method":
                continue
            with graph.inserting_before(node):
                local = _local_count(graph, anchor, count)
            if local is not None:
                node.replace_input_with(count, local)


def _local_count(graph: fx.Graph, anchor: fx.Node, count: fx.Node) -> fx.Node | None:
    """`count` as size(anchor, 0) · p // q, or None where it is not proportional to the batch size."""
    small, large = count.meta["pair"]
    sizes = tuple(value.shape[0] for value in anchor.meta["pair"])
    if small * sizes[1] != large * sizes[0]:
        return None
    node = graph.call_method("size", (anchor, 0))
    node.meta["pair"] = sizes
    if small != sizes[0]:
        node = graph.call_function(operator.mul, (node, small))
        node = graph.call_function(operator.floordiv, (node, sizes[0]))
        node.meta["pair"] = count.meta["pair"]
    return node


def _insert_normalize(program: fx.GraphModule, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    program.add_submodule(NORMALIZE, Normalize(mean, std))
    placeholder = next(node for node in program.graph.nodes if node.op == "placeholder")
    with program.graph.inserting_after(placeholder):
        node = program.graph.call_module(NORMALIZE, (placeholder,))
    node.meta["pair"] = placeholder.meta["pair"]
    placeholder.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _graph(program: fx.GraphModule, name: str) -> Graph:
    """The typed graph of a traced program."""
    axes: dict[fx.Node, Axes] = {}
    grids: dict[fx.Node, tuple[Grid, ...]] = {}
    counted: set[int] = set()
    ops: list[Op] = []
    value, output = None, ""
    image: Grid | None = None  # of the input, which comes before every value with positions
    for node in program.graph.nodes:
        if node.op == "output":
            output = _single_output(node, name)
            continue
        near = tuple(dict.fromkeys(grid for operand in node.all_input_nodes for grid in grids[operand]))
        found = _axes(program, node, axes, near)
        if found is not None:
            axes[node] = found
        grids[node] = (found.maps if found else ()) or near
        image = image or (found.maps[0] if found and found.maps else None)
        kind = _type(node, found, image)
        if node.op == "placeholder":
            value = Value(node.name, kind)
            continue
        params = _fresh_params(program, node, counted)
        inputs = tuple(operand.name for operand in node.all_input_nodes)
        size = 4 * kind.numel if kind.shape else 0
        ops.append(Op(node.name, node.op, target_name(node), inputs, kind, params, node.meta.get("macs", 0), size))
    if value is None:
        raise UsageError(f"donor {name} takes no input")
    return Graph(name, value, tuple(ops), output)


def _single_output(node: fx.Node, name: str) -> str:
    result = node.args[0]
    if not isinstance(result, fx.Node) or not is_batched(result):
        raise UsageError(
            f"donor {name} does not return one tensor with a batch axis: wrap it so that it returns its logits"
        )
    return result.name


def _fresh_params(program: fx.GraphModule, node: fx.Node, counted: set[int]) -> int:
    """Parameters that `node` uses and no earlier one did."""
    if node.op == "call_module":
        found = list(program.get_submodule(str(node.target)).parameters())
    elif node.op == "get_attr":
        found = [p for p in [_attribute(program, str(node.target))] if isinstance(p, nn.Parameter)]
    else:
        return 0
    fresh = [p for p in found if id(p) not in counted]
    counted.update(id(p) for p in fresh)
    return sum(p.numel() for p in fresh)


def _attribute(module: nn.Module, target: str) -> Any:
    return operator.attrgetter(target)(module)


def _axes(program: fx.GraphModule, node: fx.Node, known: Mapping[fx.Node, Axes], near: tuple[Grid, ...]) -> Axes | None:
    """Axes of a tensor with the plain batch axis; None for any other value."""
    value = node.meta.get("pair", (None, None))[0]
    if not is_batched(node) or value.shape[0] != BATCHES[0]:
        return None
    module = program.get_submodule(str(node.target)) if node.op == "call_module" else None
    return follow(node, tuple(value.shape[1:]), known, near, module)


def _type(node: fx.Node, axes: Axes | None, image: Grid | None) -> TensorType:
    value = node.meta.get("pair", (None, None))[0]
    if not isinstance(value, torch.Tensor):
        return TensorType((), Layout.OTHER, "tuple")
    dtype = str(value.dtype).removeprefix("torch.")
    if axes is None:
        return TensorType(tuple(value.shape[1:] if is_batched(node) else value.shape), Layout.OTHER, dtype)
    kind = axes.type(dtype)
    return scaled(kind, image) if image else kind


def _calls(tracer: ShapeTracer, graph: fx.Graph) -> tuple[Call, ...]:
    """The submodule calls that can stand for the nodes they were traced into, outermost first."""
    alive = {node.name for node in graph.nodes}
    images = next(node.name for node in graph.nodes if node.op == "placeholder")
    entry = next((node.name for node in graph.nodes if node.target == NORMALIZE), images)
    calls = []
    for record in tracer.records:
        members = frozenset(name for name in record.members if name in alive)
        if record.result in alive and record.argument in alive and tracer.times_called[record.path] == 1 and members:
            argument = entry if record.argument == images else record.argument
            calls.append(Call(record.path, argument, record.result, members))
    return tuple(sorted(calls, key=lambda call: (call.path.count("."), call.path)))


def _check_exact(lowered: Lowered, input_shape: tuple[int, int, int], *, normalized: bool) -> None:
    """Hold the traced program against the untouched module on a batch size that was not traced."""
    x = torch.rand(BATCHES[0] - 1, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = lowered.program.get_submodule(NORMALIZE)(x) if normalized else x
        want, got = lowered.module(inner.clone()), lowered.program(x.clone())
    if not torch.equal(want, got):
        if torch.isnan(want).any():
            raise UsageError(f"donor {lowered.graph.name} returns NaN on ordinary images: its weights are broken")
        raise UsageError(
            f"donor {lowered.graph.name} cannot be lowered exactly: its forward pass depends on data or batch size"
        )
