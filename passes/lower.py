"""lower: trace a network into a typed graph over its own submodules, shapes folded to constants, batch size free."""

from __future__ import annotations

import copy
import inspect
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from derc import uncut
from derc.artifacts import LoweredZoo, digest
from derc.batchnorm import broken
from derc.blame import check_hooks, place
from derc.errors import DercError, UsageError
from derc.ir import NORMALIZE
from derc.lowered import Call, Lowered
from derc.mode import Mode, ModeBranchError, in_eval
from derc.modules import Normalize
from derc.pipeline import Context
from derc.proxies import BATCHES, is_batched, is_count
from derc.tracing import ShapeTracer
from derc.typed import typed_graph


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

    Raises UsageError where the forward pass depends on the data, the traced program is not exactly the module, or a
    batch norm's statistics are no mean and variance.
    """
    if (problem := broken(module)) is not None:
        raise UsageError(f"donor {name} cannot be lowered: {problem}: give it weights that were saved whole")
    with in_eval(module):
        lowered = _lower(module, input_shape, name, mean or (), std or ())
    lowered.program.training = module.training
    return lowered


def _lower(
    module: nn.Module, input_shape: tuple[int, int, int], name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Lowered:
    try:
        tracer, graph = _trace(module, input_shape)
    except UsageError as error:
        raise UsageError(f"donor {name} cannot be lowered: {error}") from error
    localise_counts(graph)
    edits = uncut.edits(graph.nodes)
    program = fx.GraphModule(_live(module, tracer.root, graph), graph)
    graph.eliminate_dead_code()
    if any(mean) or any(s != 1 for s in std):
        _insert_normalize(program, mean, std)
    program.recompile()
    typed = typed_graph(program, name, module)
    if isinstance(tracer.root.training, Mode) and tracer.root.training.asked:
        typed = replace(typed, notes={"training": "branches on its mode: in training too, blocks take eval's branch"})
    typed.verify()
    lowered = Lowered(module, program, typed, _calls(tracer, graph))
    _check_exact(lowered, input_shape, edits)
    return lowered


def _trace(module: nn.Module, input_shape: tuple[int, int, int]) -> tuple[ShapeTracer, fx.Graph]:
    """Trace a copy, anew with every type of module that turns out to branch on its training mode kept whole."""
    _check_signature(module)
    check_hooks(module, "")
    _warm_up(module, input_shape)
    whole: frozenset[type] = frozenset()
    while True:
        tracer = ShapeTracer(input_shape, whole)
        try:
            return tracer, tracer.trace(_copy(module))
        except ModeBranchError as branch:
            whole |= {branch.owner}
        except DercError as error:
            raise UsageError(f"{error}{place(error, tracer.failed, module)}") from error
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            where = place(error, tracer.failed, module)
            raise UsageError(f"it cannot be traced for input {input_shape}: {_first_line(error)}{where}") from error


def _warm_up(module: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Run once on real tensors: some libraries cache what they compute, and would keep the tracer's fake ones."""
    try:
        with torch.no_grad():
            module(torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # a network of any origin may raise anything
        where = place(error, None, module)
        raise UsageError(
            f"it cannot be traced, for it does not run at {input_shape}: {_first_line(error)}{where}"
        ) from error


def _copy(module: nn.Module) -> nn.Module:
    """A copy that shares the weights' storage, which tracing on fake tensors leaves alone, and needs no gradients."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shared)


def _check_signature(module: nn.Module) -> None:
    """Raise UsageError where the forward pass needs more than the images."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    if len(required) > 1:
        code = inspect.unwrap(module.forward).__code__
        raise UsageError(
            f"the forward pass of {type(module).__name__} takes several inputs ({', '.join(required)}; "
            f"{code.co_filename}:{code.co_firstlineno}): wrap it so that it takes the images alone"
        )


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
            if local:
                node.replace_input_with(count, local[-1])
            for part in local:
                part.meta["counts_for"] = node.name


def _local_count(graph: fx.Graph, anchor: fx.Node, count: fx.Node) -> list[fx.Node]:
    """Nodes that make `count` as size(anchor, 0) · p // q, none where it is not proportional to the batch size."""
    small, large = count.meta["pair"]
    sizes = tuple(value.shape[0] for value in anchor.meta["pair"])
    if small * sizes[1] != large * sizes[0]:
        return []
    nodes = [graph.call_method("size", (anchor, 0))]
    nodes[0].meta["pair"] = sizes
    if small != sizes[0]:
        nodes.append(graph.call_function(operator.mul, (nodes[0], small)))
        nodes.append(graph.call_function(operator.floordiv, (nodes[1], sizes[0])))
        nodes[2].meta["pair"] = count.meta["pair"]
    return nodes


def _insert_normalize(program: fx.GraphModule, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    program.add_submodule(NORMALIZE, Normalize(mean, std))
    placeholder = next(node for node in program.graph.nodes if node.op == "placeholder")
    with program.graph.inserting_after(placeholder):
        node = program.graph.call_module(NORMALIZE, (placeholder,))
    node.meta["pair"] = placeholder.meta["pair"]
    placeholder.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _calls(tracer: ShapeTracer, graph: fx.Graph) -> tuple[Call, ...]:
    """The submodule calls that can stand for the nodes they were traced into, outermost first."""
    alive = {node.name for node in graph.nodes}
    counts: dict[str, list[str]] = {}
    for node in graph.nodes:
        counts.setdefault(node.meta.get("counts_for", ""), []).append(node.name)
    images = next(node.name for node in graph.nodes if node.op == "placeholder")
    entry = next((node.name for node in graph.nodes if node.target == NORMALIZE), images)
    calls = []
    for record in tracer.records:
        inside = [name for name in record.members if name in alive]
        members = frozenset(inside).union(*(counts.get(name, ()) for name in inside))
        if record.result in alive and record.argument in alive and tracer.times_called[record.path] == 1 and members:
            argument = entry if record.argument == images else record.argument
            calls.append(Call(record.path, argument, record.result, members))
    return tuple(sorted(calls, key=lambda call: (call.path.count("."), call.path)))


def _check_exact(lowered: Lowered, input_shape: tuple[int, int, int], edits: str) -> None:
    """Hold the traced program against the untouched module on a batch size that was not traced."""
    x = torch.rand(BATCHES[0] - 1, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = lowered.program.get_submodule(NORMALIZE)(x) if NORMALIZE in lowered.graph.types else x
        want, got = lowered.module(inner.clone()), lowered.program(x.clone())
    if torch.equal(want, got):
        return
    if torch.isnan(want).any():
        raise UsageError(f"donor {lowered.graph.name} returns NaN on ordinary images: its weights are broken")
    reason = (
        f"it edits a part of a value in place{edits}" if edits else "its forward pass depends on data or batch size"
    )
    raise UsageError(f"donor {lowered.graph.name} cannot be lowered exactly: {reason}")
