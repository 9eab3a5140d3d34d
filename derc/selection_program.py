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
    """A limit on one resource, in `unit`s: an upper one, or with `sign` −1 a lower one.

    `option` is its name on the command line, `least` the superlative of what comes nearest to it.
    """

    resource: str
    option: str
    limit: float
    unit: str
    least: str
    sign: int = 1

    def met(self, amount: float) -> bool:
        """Whether an amount keeps to the limit, up to the slack."""
        return self.sign * amount <= self.sign * self.limit + SLACK * self.limit


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

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The edges of each known assembly."""
        return tuple(self.learnt.graph.path(assembly) or () for assembly in self.known)

    def amounts(self, resource: str) -> Array:
        """What each edge, then each known assembly, takes of `loss` or of a budget's resource.

        Memory is that of the weights; the peak activation comes on top of it.
        """
        graph, learnt = self.learnt.graph, self.learnt
        if resource == "loss":
            return np.concatenate([learnt.loss, [learnt.expected_loss(a) for a in self.known]])
        if resource == "latency_ms":
            return self._latencies()
        if resource == "blocks":
            edges = ((graph.tail < 0) | (graph.stitch >= 0)).astype(float)
            return np.concatenate([edges, [edges[list(path)].sum() for path in self.paths]])
        name, scale = {"params_m": ("params", 1e-6), "macs_g": ("macs", 1e-9), "memory_mb": ("weights", 1e-6)}[resource]
        column = scale * graph.column(name)
        return np.concatenate([column, [column[list(path)].sum() for path in self.paths]])

    def _latencies(self) -> Array:
        edges = np.asarray(self.learnt.latency_ms) / (1 - self.margin)
        known = [
            self.learnt.measured[a][1] if a in self.learnt.measured else edges[list(path)].sum()
            for a, path in zip(self.known, self.paths, strict=True)
        ]
        return np.concatenate([edges, known])

    def ready(self, budgets: tuple[Budget, ...], barred: tuple[Assembly, ...] = ()) -> tuple[Assembly, ...]:
        """The known assemblies within the budgets that are not barred, best first."""
        loss = self.amounts("loss")[self.learnt.graph.count :]
        fits = np.ones(len(self.known), bool)
        for budget in budgets:
            amounts = self.taken(budget.resource)[self.learnt.graph.count :]
            fits &= np.array([budget.met(amount) for amount in amounts], bool)
        order = np.argsort(loss, kind="stable")
        return tuple(self.known[i] for i in order if fits[i] and self.known[i] not in set(barred))

    def apart(self, assembly: Assembly, others: tuple[Assembly, ...], diversity: int) -> bool:
        """Whether an assembly is `diversity` blocks away from all others."""
        own = self.members(assembly)
        sets = [self.members(other) for other in others]
        return all(len(other & own) <= max(len(other) - diversity, 0) for other in sets)

    def taken(self, resource: str) -> Array:
        """`amounts`, and for memory the largest activation on top, which is only right for known assemblies."""
        peaks = self.peaks if resource == "memory_mb" else 0.0
        return self.amounts(resource) + peaks

    def build(
        self,
        resource: str,
        budgets: tuple[Budget, ...] = (),
        earlier: tuple[Assembly, ...] = (),
        diversity: int = 1,
        barred: tuple[Assembly, ...] = (),
        sign: int = 1,
    ) -> IntegerProgram:
        """The program that minimises `resource` within `budgets`, without the known assemblies `barred`.

        With `sign` −1 it maximises. The answer is `diversity` blocks away from each of `earlier`, where a block in
        another precision is the same. Columns: edges, known assemblies, then the peak activation in MB where memory
        matters.
        """
        builder = Builder()
        names = [*map(str, self.learnt.graph.edges), *(f"known {assembly}" for assembly in self.known)]
        for name, cost in zip(names, self.amounts(resource), strict=True):
            builder.variable(name, sign * float(cost))
        self._add_flow(builder)
        memory = "memory_mb" in (resource, *(budget.resource for budget in budgets))
        peak = self._add_peak(builder, float(resource == "memory_mb")) if memory else -1
        for budget in budgets:
            terms = dict(enumerate(map(float, self.amounts(budget.resource) / budget.limit)))
            if budget.resource == "memory_mb":
                terms[peak] = 1 / budget.limit
            if budget.sign > 0:
                builder.row(budget.option, terms, upper=1 + SLACK)
            else:
                builder.row(budget.option, terms, lower=1 - SLACK)
        for assembly in earlier:
            self._add_difference(builder, assembly, diversity)
        for assembly in barred:
            column = self.learnt.graph.count + self.known.index(assembly)
            builder.row(f"not {assembly}", {column: 1.0}, upper=0)
        return builder.build()

    def _add_flow(self, builder: Builder) -> None:
        """One path or one known assembly, and no known assembly in the form of its path."""
        graph, first = self.learnt.graph, self.learnt.graph.count
        own = range(first, first + len(self.known))
        builder.row("one assembly", dict.fromkeys([*graph.leaving[None], *own], 1.0), lower=1, upper=1)
        for block in graph.blocks:
            terms = dict.fromkeys(graph.entering[block], 1.0) | dict.fromkeys(graph.leaving[block], -1.0)
            builder.row(f"through {block}", terms, lower=0, upper=0)
        for assembly, path in zip(self.known, self.paths, strict=True):
            builder.row(f"not the path of {assembly}", dict.fromkeys(path, 1.0), upper=len(path) - 1)

    @cached_property
    def peaks(self) -> Array:
        """The largest activation of each edge, then of each known assembly, in MB."""
        edges = self.learnt.graph.column("activation") / 1e6
        return np.concatenate([edges, [edges[list(path)].max() for path in self.paths]])

    def _add_peak(self, builder: Builder, cost: float) -> int:
        """The column of the largest activation on the path."""
        peak = builder.variable("peak", cost, upper=float(self.peaks.max()), integer=False)
        graph, first = self.learnt.graph, self.learnt.graph.count
        groups = {str(block): graph.entering[block] for block in graph.blocks}
        groups["known"] = tuple(range(first, first + len(self.known)))
        for name, columns in groups.items():
            if columns:
                terms = {column: -float(self.peaks[column]) for column in columns}
                builder.row(f"peak of {name}", terms | {peak: 1.0}, lower=0)
        return peak

    def _add_difference(self, builder: Builder, earlier: Assembly, diversity: int) -> None:
        """At most |earlier| − diversity of the earlier assembly's blocks, in whatever precision."""
        graph, own = self.learnt.graph, self.members(earlier)
        entered = np.append(np.isin(graph.plain, list(own)), False)[graph.head]
        terms = dict.fromkeys(np.flatnonzero(entered).tolist(), 1.0)
        for place, assembly in enumerate(self.known):
            terms[graph.count + place] = float(len(own & self.members(assembly)))
        builder.row(f"other than {earlier}", terms, upper=max(len(own) - diversity, 0))

    def members(self, assembly: Assembly) -> frozenset[int]:
        """The blocks of an assembly of the graph, in whatever precision, as numbers in `Layered.plain`."""
        graph = self.learnt.graph
        heads = graph.head[list(graph.path(assembly) or ())[:-1]]
        return frozenset(graph.plain[heads].tolist())

    def start(self, assembly: Assembly, program: IntegerProgram) -> Array:
        """The point of `program` that stands for an assembly of the graph, to begin a solve from."""
        x = np.zeros(len(program.cost))
        path = self.learnt.graph.path(assembly) or ()
        columns = [self.learnt.graph.count + self.known.index(assembly)] if assembly in self.known else list(path)
        x[columns] = 1
        if len(x) > self.learnt.graph.count + len(self.known):
            x[-1] = self.peaks[columns].max()
        return x

    def read(self, x: Array) -> Assembly:
        """The assembly that a solution of `build`'s program stands for."""
        first = self.learnt.graph.count
        chosen = np.flatnonzero(x[: first + len(self.known)] > 0.5)
        if chosen[0] >= first:
            return self.known[int(chosen[0]) - first]
        return self.learnt.graph.assembly(map(int, chosen))
