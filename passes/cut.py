"""cut: the values that every path from input to output passes through, thinned to those with work between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx

from derc.artifacts import CutDonor, CutZoo, LoweredZoo, Unit
from derc.ir import NORMALIZE, Graph, Layout, Op, Value
from derc.pipeline import Context

NEGLIGIBLE = 0.005
LEAST_UNITS = 4


@dataclass(frozen=True)
class CutDonors:
    """Finds every donor's cuts; a unit with less than this share of MACs and of parameters is merged."""

    negligible: float = NEGLIGIBLE
    name: ClassVar[str] = "cut"
    produces: ClassVar[type] = CutZoo

    def inputs(self, context: Context) -> str:
        return ""

    def run(self, context: Context, lowered: LoweredZoo) -> CutZoo:
        return CutZoo({name: find_cuts(graph, self.negligible) for name, graph in lowered.graphs.items()})


def dominators(graph: Graph) -> list[str]:
    """Names of the values that dominate the output, from the input to the output."""
    tree = nx.immediate_dominators(graph.networkx(), graph.input.name)
    chain = [graph.output]
    while chain[-1] != graph.input.name:
        chain.append(tree[chain[-1]])
    return chain[::-1]


def find_cuts(graph: Graph, negligible: float = NEGLIGIBLE) -> CutDonor:
    """Cuts and units of one network; every interior cut is a float tensor of known layout with the plain batch axis.

    Thinning stops at three interior cuts, so that a network of one heavy part can still take part with four blocks.
    """
    chain = dominators(graph)
    kept = [name for name in chain[1:-1] if name != NORMALIZE and _stitchable(graph, name)]
    names = _untied(graph, [chain[0], *kept, chain[-1]])
    units = _units(graph, names)
    totals = max(sum(unit.macs for unit in units), 1), max(sum(unit.params for unit in units), 1)
    while len(units) > LEAST_UNITS:
        shares = [max(unit.macs / totals[0], unit.params / totals[1]) for unit in units]
        smallest = min(range(len(units)), key=lambda i: shares[i])
        if shares[smallest] >= negligible:
            break
        del names[_superfluous(graph, names, smallest)]
        units = _units(graph, names)
    return CutDonor(tuple(Value(name, graph.types[name]) for name in names), units)


def _untied(graph: Graph, names: list[str]) -> list[str]:
    """The cuts without those that part operations which share a weight."""
    places = _places(graph, names)
    parted = set[int]()
    for tie in graph.ties:
        units = [places[name] for name in tie.ops if name in places]
        parted |= set(range(min(units, default=0) + 1, max(units, default=0) + 1))
    return [name for index, name in enumerate(names) if index not in parted]


def _stitchable(graph: Graph, name: str) -> bool:
    kind = graph.types[name]
    return kind.layout is not Layout.OTHER and kind.dtype == "float32"


def _superfluous(graph: Graph, names: list[str], unit: int) -> int:
    """Which end of a negligible unit goes: never the input or output, else the wider, else the earlier."""
    if unit == 0:
        return 1
    if unit == len(names) - 2:
        return unit
    before, after = graph.types[names[unit]].numel, graph.types[names[unit + 1]].numel
    return unit if before >= after else unit + 1


def _places(graph: Graph, names: list[str]) -> dict[str, int]:
    """The unit of every operation between cuts; data-independent ones belong where they are first needed."""
    ends = {name: index for index, name in enumerate(names)}
    place: dict[str, int] = {}
    for op in reversed(graph.ops):
        if op.name in ends:
            place[op.name] = ends[op.name] - 1
        for name in op.inputs if op.name in place else ():
            place[name] = min(place.get(name, len(names)), place[op.name])
    return place


def _units(graph: Graph, names: list[str]) -> tuple[Unit, ...]:
    """Costs between neighbouring cuts."""
    inside: list[list[Op]] = [[] for _ in names[1:]]
    places = _places(graph, names)
    for op in graph.ops:
        if op.name in places:
            inside[places[op.name]].append(op)
    return tuple(
        Unit(
            params=sum(op.params for op in ops),
            macs=sum(op.macs for op in ops),
            bytes=max((op.bytes for op in ops), default=0),
            ops=len(ops),
        )
        for ops in inside
    )
