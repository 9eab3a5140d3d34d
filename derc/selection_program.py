"""The selection as an integer program: the cheapest path through the layered graph within the budgets.

Besides a variable for each edge there is one for each assembly about which something is known as a whole, so that its
known loss and latency hold exactly; its path through the edges is then excluded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc.artifacts import Array, Assembly
from derc.learnt import Learnt
from derc.milp import Builder, IntegerProgram

SLACK = 1e-9
"""A budget counts as met up to this share of it, so that an assembly meets a budget of exactly its own cost."""


@dataclass(frozen=True)
class Budget:
    """An upper limit on one resource, in `unit`s; `option` is its name on the command line, `least` its superlative."""

    resource: str
    option: str
    limit: float
    unit: str
    least: str


@dataclass(frozen=True)
class PathProgram:
    """Costs of all edges and known assemblies, from which programs for any objective and budgets are built.

    Latencies are ms: predictions divided by (1 − margin), measurements by the upper end of their interval.
    """

    learnt: Learnt
    margin: float

    @cached_property
    def known(self) -> tuple[Assembly, ...]:
        """Assemblies with a variable of their own."""
        graph = self.learnt.graph
        seen = dict.fromkeys((*self.learnt.measured, *self.learnt.losses))
        return tuple(assembly for assembly in seen if graph.path(assembly) is not None)

    def amounts(self, resource: str) -> Array:
        """What each edge, then each known assembly, takes of `loss` or of a budget's resource.

        Memory is that of the weights; the peak activation comes on top of it.
        """
        graph, learnt = self.learnt.graph, self.learnt
        if resource == "loss":
            return np.concatenate([learnt.loss, [learnt.expected_loss(a) for a in self.known]])
        if resource == "latency_ms":
            return self._latencies()
        name, scale = {"params_m": ("params", 1e-6), "macs_g": ("macs", 1e-9), "memory_mb": ("weights", 1e-6)}[resource]
        column = scale * graph.column(name)
        return np.concatenate([column, [column[list(graph.path(a) or ())].sum() for a in self.known]])

    def _latencies(self) -> Array:
        edges = np.asarray(self.learnt.latency_ms) / (1 - self.margin)
        paths = [list(self.learnt.graph.path(a) or ()) for a in self.known]
        known = [
            self.learnt.measured[a][1] if a in self.learnt.measured else edges[path].sum()
            for a, path in zip(self.known, paths, strict=True)
        ]
        return np.concatenate([edges, known])

    def fits(self, assembly: Assembly, budgets: tuple[Budget, ...]) -> bool:
        """Whether a known assembly meets the budgets."""
        place = len(self.learnt.graph.edges) + self.known.index(assembly)
        for budget in budgets:
            amount = self.amounts(budget.resource)[place]
            amount += self._peaks[place] if budget.resource == "memory_mb" else 0.0
            if amount > budget.limit * (1 + SLACK):
                return False
        return True

    def build(
        self,
        resource: str,
        budgets: tuple[Budget, ...] = (),
        earlier: tuple[Assembly, ...] = (),
        diversity: int = 1,
        barred: tuple[Assembly, ...] = (),
    ) -> IntegerProgram:
        """The program that minimises `resource` within `budgets`, without the known assemblies `barred`.

        The answer is `diversity` blocks away from each of `earlier`, where a block in another precision is the same.
        Columns: edges, known assemblies, then the peak activation in MB where memory matters.
        """
        builder = Builder()
        names = [*map(str, self.learnt.graph.edges), *(f"known {assembly}" for assembly in self.known)]
        for name, cost in zip(names, self.amounts(resource), strict=True):
            builder.variable(name, float(cost))
        self._add_flow(builder)
        memory = "memory_mb" in (resource, *(budget.resource for budget in budgets))
        peak = self._add_peak(builder, float(resource == "memory_mb")) if memory else -1
        for budget in budgets:
            terms = dict(enumerate(map(float, self.amounts(budget.resource) / budget.limit)))
            if budget.resource == "memory_mb":
                terms[peak] = 1 / budget.limit
            builder.row(budget.option, terms, upper=1 + SLACK)
        for assembly in earlier:
            self._add_difference(builder, assembly, diversity)
        for assembly in barred:
            column = len(self.learnt.graph.edges) + self.known.index(assembly)
            builder.row(f"not {assembly}", {column: 1.0}, upper=0)
        return builder.build()

    def _add_flow(self, builder: Builder) -> None:
        """One path or one known assembly, and no known assembly in the form of its path."""
        graph, first = self.learnt.graph, len(self.learnt.graph.edges)
        own = range(first, first + len(self.known))
        builder.row("one assembly", dict.fromkeys([*graph.leaving[None], *own], 1.0), lower=1, upper=1)
        for block in graph.blocks:
            terms = dict.fromkeys(graph.entering[block], 1.0) | dict.fromkeys(graph.leaving[block], -1.0)
            builder.row(f"through {block}", terms, lower=0, upper=0)
        for assembly in self.known:
            path = graph.path(assembly) or ()
            builder.row(f"not the path of {assembly}", dict.fromkeys(path, 1.0), upper=len(path) - 1)

    @cached_property
    def _peaks(self) -> Array:
        graph = self.learnt.graph
        edges = graph.column("activation") / 1e6
        return np.concatenate([edges, [edges[list(graph.path(a) or ())].max() for a in self.known]])

    def _add_peak(self, builder: Builder, cost: float) -> int:
        """The column of the largest activation on the path."""
        peak = builder.variable("peak", cost, upper=float(self._peaks.max()), integer=False)
        graph, first = self.learnt.graph, len(self.learnt.graph.edges)
        groups = {str(block): graph.entering[block] for block in graph.blocks}
        groups["known"] = tuple(range(first, first + len(self.known)))
        for name, columns in groups.items():
            if columns:
                terms = {column: -float(self._peaks[column]) for column in columns}
                builder.row(f"peak of {name}", terms | {peak: 1.0}, lower=0)
        return peak

    def _add_difference(self, builder: Builder, earlier: Assembly, diversity: int) -> None:
        """At most |earlier| − diversity of the earlier assembly's blocks, in whatever precision."""
        graph, first, blocks = self.learnt.graph, len(self.learnt.graph.edges), set(earlier.plain.blocks)
        terms = {column: 1.0 for block in graph.blocks if block.plain in blocks for column in graph.entering[block]}
        for place, assembly in enumerate(self.known):
            terms[first + place] = float(len(blocks & set(assembly.plain.blocks)))
        builder.row(f"other than {earlier}", terms, upper=max(len(earlier.blocks) - diversity, 0))

    def read(self, x: Array) -> Assembly:
        """The assembly that a solution of `build`'s program stands for."""
        first = len(self.learnt.graph.edges)
        chosen = np.flatnonzero(x[: first + len(self.known)] > 0.5)
        if chosen[0] >= first:
            return self.known[int(chosen[0]) - first]
        return self.learnt.graph.assembly(map(int, chosen))
