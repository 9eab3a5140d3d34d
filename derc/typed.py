"""A traced program as a typed dataflow graph: types, costs and shared weights of every operation."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from derc.errors import UsageError
from derc.ir import Graph, Layout, Op, TensorType, Tie, Value, scaled
from derc.layouts import Axes, Grid, follow, target_name
from derc.proxies import BATCHES, is_batched


def typed_graph(program: fx.GraphModule, name: str, module: nn.Module) -> Graph:
    """The typed graph of a traced program."""
    axes: dict[fx.Node, Axes] = {}
    grids: dict[fx.Node, tuple[Grid, ...]] = {}
    counted: set[int] = set()
    ops: list[Op] = []
    value, output = None, ""
    image: Grid | None = None  # of the input, which comes before every value with positions
    for node in program.graph.nodes:
        if node.op == "output":
            output = _single_output(node, name, module)
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
    return Graph(name, value, tuple(ops), output, ties=_ties(program))


def _ties(program: fx.GraphModule) -> tuple[Tie, ...]:
    """Parameters that more than one operation works on data with; tables made from them tie nothing if not random."""
    uses: dict[int, dict[str, None]] = {}
    paths: dict[int, str] = {}
    named = {id(parameter): path for path, parameter in program.named_parameters(remove_duplicate=True)}
    for node in program.graph.nodes:
        if not any(is_batched(operand) for operand in node.all_input_nodes):
            continue
        for parameter in _weights(program, node):
            uses.setdefault(id(parameter), {})[node.name] = None
            paths[id(parameter)] = named[id(parameter)]
    ties = [Tie(paths[key], tuple(ops)) for key, ops in uses.items() if len(ops) > 1]
    return (*ties, *_random_ties(program))


def _random_ties(program: fx.GraphModule) -> list[Tie]:
    """Tables that dropout works on before they meet the data: every block would draw its own."""
    ties, drawn = [], dict[fx.Node, set[fx.Node]]()
    for node in program.graph.nodes:
        sources = set().union(*(drawn.get(operand, ()) for operand in node.all_input_nodes))
        if node.op != "output" and not is_batched(node):
            drawn[node] = sources | ({node} if _drops(program, node) else set())
    for source in [node for node in drawn if node in drawn[node]]:
        tables = [table for table, sources in drawn.items() if source in sources]
        users = {user.name: None for table in tables for user in table.users if is_batched(user)}
        if len(users) > 1:
            ties.append(Tie(target_name(source), tuple(users)))
    return ties


def _drops(program: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is random in training: dropout, or a module that has some."""
    if node.op != "call_module":
        return "dropout" in target_name(node)
    parts = program.get_submodule(str(node.target)).modules()
    return any(isinstance(part, _DropoutNd) and part.p > 0 for part in parts)


def _weights(program: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """Parameters that a node uses itself: its module's, or those that it is given."""
    if node.op == "call_module":
        return list(program.get_submodule(str(node.target)).parameters())
    given = [_attribute(program, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [value for value in given if isinstance(value, nn.Parameter)]


def _single_output(node: fx.Node, name: str, module: nn.Module) -> str:
    result = node.args[0]
    if isinstance(result, fx.Node) and is_batched(result):
        return result.name
    kind = type(result).__name__
    if isinstance(result, Mapping):
        kind += f" ({', '.join(map(str, result))})"
    elif isinstance(result, Sequence):
        kind += f" of {len(result)}"
    code = inspect.unwrap(module.forward).__code__
    raise UsageError(
        f"donor {name} does not return one tensor with a batch axis but a {kind} "
        f"({code.co_filename}:{code.co_firstlineno}): wrap it so that it returns its logits"
    )


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
