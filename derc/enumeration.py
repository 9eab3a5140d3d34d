"""All paths within limits whose cost is at most a threshold: depth first in wide steps, with a look ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from derc.artifacts import Array
from derc.dag import Dag, Limits
from derc.dual import Dual

WIDTH = 1 << 16
"""Paths begun that are looked at together."""
SPREAD = 32
"""Edges that a beam looks at for each path that it may keep."""
MARGIN = 1e-9
"""Of the threshold's distance from the bound and of the costs, so that rounding cuts nothing off."""


@dataclass(frozen=True, eq=False)
class Apart:
    """Paths must share at most `most` (groups) of the members of each group; `member` is (groups, edges by name)."""

    member: Array
    most: Array


@dataclass(frozen=True, eq=False)
class Found:
    """Complete paths as edge numbers (n, longest), −1 beyond a path's end, and their costs, cheapest first."""

    edges: Array
    costs: Array
    complete: bool
    begun: int
    """Paths begun that were looked at."""


NOTHING = Found(np.zeros((0, 1), int), np.zeros(0), True, 0)


@dataclass(frozen=True, eq=False)
class _Front:
    """Paths begun: where they are, what is left of the threshold, and what they have taken."""

    node: Array
    left: Array
    amounts: Array
    peak: Array
    shared: Array
    edges: Array

    def part(self, which: slice | Array) -> _Front:
        return _Front(
            self.node[which],
            self.left[which],
            self.amounts[:, which],
            self.peak[which],
            self.shared[:, which],
            self.edges[which],
        )


def enumerate_paths(
    dag: Dag, limits: Limits, dual: Dual, threshold: float, apart: Apart | None = None, deadline: float = inf
) -> Found:
    """Every path of `dag` within `limits`, and `apart`, that costs at most `threshold`.

    All edges of `dag` lie on paths. Not all are found where `deadline` (on the clock of `time.monotonic`) comes first:
    then `complete` is False.
    """
    search = _search(dag, limits, dual, threshold, apart)
    if search is None:
        return NOTHING
    found = list[_Front]()
    begun, complete = 0, True
    for front in search.run():
        begun += len(front.node)
        found.append(search.complete(front))
        if time.monotonic() > deadline:
            complete = False
            break
    return _sorted(search, found, begun, complete)


def beam(dag: Dag, limits: Limits, dual: Dual, threshold: float, width: int, apart: Apart | None = None) -> Found:
    """Some of the paths that `enumerate_paths` gives: of those begun, the `width` with the best bound go on."""
    search = _search(dag, limits, dual, threshold, apart)
    if search is None:
        return NOTHING
    found, begun = list[_Front](), 0
    for front in search.run(width):
        begun += len(front.node)
        found.append(search.complete(front))
    return _sorted(search, found, begun, complete=False)


def _search(dag: Dag, limits: Limits, dual: Dual, threshold: float, apart: Apart | None) -> _Search | None:
    room = threshold - dual.bound
    room += MARGIN * (abs(room) + abs(threshold) + abs(dual.bound))
    if room < 0:
        return None
    onward = dag.from_nodes(dual.weights)
    surplus = np.maximum(dual.weights + onward[dag.head] - onward[dag.tail], 0)
    priced = replace(dag, amounts=np.vstack([dag.amounts, dag.cost]))
    bounded = Limits(np.append(limits.lower, -inf), np.append(limits.upper, _above(threshold)), limits.peaked)
    return _Search.over(priced, surplus, bounded, room, apart)


def _above(threshold: float) -> float:
    return threshold + MARGIN * abs(threshold)


def _sorted(search: _Search, found: list[_Front], begun: int, complete: bool) -> Found:
    longest = max((front.edges.shape[1] for front in found), default=1)
    edges = [np.pad(f.edges, ((0, 0), (0, longest - f.edges.shape[1])), constant_values=-1) for f in found]
    every = np.vstack(edges) if edges else np.zeros((0, longest), int)
    costs = np.concatenate([front.amounts[-1] for front in found]) if found else np.zeros(0)
    every = np.where(every >= 0, search.dag.names[every], -1)
    order = np.lexsort((*every.T[::-1], costs))
    return Found(every[order], costs[order], complete, begun)


@dataclass(frozen=True, eq=False)
class _Search:
    """A graph of which each node's edges are sorted by surplus, with what is still to come from each node at least."""

    dag: Dag
    surplus: Array
    keys: Array
    stride: float
    room: float
    limits: Limits
    least: Array
    most: Array
    peak: Array
    apart: Apart | None

    @classmethod
    def over(cls, dag: Dag, surplus: Array, limits: Limits, room: float, apart: Apart | None) -> _Search:
        dag, surplus = _pruned(dag, surplus, limits, room)
        order = np.lexsort((surplus, dag.tail))
        dag, surplus = dag.at(order), surplus[order]
        stride = 2 * room + 1e-300
        least, most = dag.from_nodes(dag.amounts), -dag.from_nodes(-dag.amounts)
        peak = dag.from_nodes(dag.peak, np.maximum, -inf) if limits.peaked >= 0 else np.zeros(dag.nodes)
        members = Apart(apart.member[:, dag.names].astype(np.int16), apart.most) if apart else None
        return cls(dag, surplus, dag.tail * stride + surplus, stride, room, limits, least, most, peak, members)

    def run(self, width: int = 0) -> Iterator[_Front]:
        """Fronts of paths that may still be completed, in a depth-first order; the sink's are complete.

        With a `width` no more than the best so many of each length are followed, each along its best edges alone.
        """
        groups = len(self.apart.most) if self.apart else 0
        start = _Front(
            np.zeros(1, int),
            np.full(1, self.room),
            np.zeros((len(self.dag.amounts), 1)),
            np.full(1, -inf),
            np.zeros((groups, 1), np.int16),
            np.zeros((1, 0), np.int32),
        )
        stack = [start] if len(self.dag.tail) else []
        while stack:
            front = stack.pop()
            counts = self._counts(front)
            if width:
                counts = np.minimum(counts, max(SPREAD * width // max(len(counts), 1), 1))
            parts = _cuts(counts) if not width else [slice(0, len(counts))]
            if len(parts) > 1:
                stack += [front.part(part) for part in reversed(parts)]
                continue
            grown = self._grown(front, counts)
            yield grown
            going = np.flatnonzero(grown.node != self.dag.nodes - 1)
            if width and len(going) > width:
                going = np.sort(going[np.argsort(-grown.left[going], kind="stable")[:width]])
            if len(going):
                stack.append(grown.part(going))

    def _counts(self, front: _Front) -> Array:
        """How many edges each path may go on with."""
        ends = np.searchsorted(self.keys, front.node * self.stride + front.left, side="right")
        counts: Array = np.minimum(ends, self.dag.first[front.node + 1]) - self.dag.first[front.node]
        return counts

    def _grown(self, front: _Front, counts: Array) -> _Front:
        """The paths, one edge longer, that may still be completed within everything."""
        parent = np.repeat(np.arange(len(counts)), counts)
        offset = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
        edge = self.dag.first[front.node][parent] + offset
        amounts = front.amounts[:, parent] + self.dag.amounts[:, edge]
        node = self.dag.head[edge]
        peak = np.maximum(front.peak[parent], self.dag.peak[edge])
        fits = self._fits(node, amounts, peak)
        shared = front.shared
        if self.apart:
            shared = front.shared[:, parent] + self.apart.member[:, edge]
            fits &= (shared <= self.apart.most[:, None]).all(axis=0)
        keep = np.flatnonzero(fits)
        return _Front(
            node[keep],
            front.left[parent[keep]] - self.surplus[edge[keep]],
            amounts[:, keep],
            peak[keep],
            shared[:, keep] if self.apart else np.zeros((0, len(keep)), np.int16),
            np.column_stack([front.edges[parent[keep]], edge[keep].astype(np.int32)]),
        )

    def _fits(self, node: Array, amounts: Array, peak: Array) -> Array:
        """Whether the least, and the most, that is still to come leaves the limits attainable."""
        fits = np.ones(len(node), bool)
        for row, (low, high) in enumerate(zip(self.limits.low, self.limits.high, strict=True)):
            slack = 1e-12 * max(abs(low) if low > -inf else 0.0, abs(high) if high < inf else 0.0)
            top = np.maximum(peak, self.peak[node]) if row == self.limits.peaked else 0.0
            if high < inf:
                fits &= amounts[row] + self.least[row, node] + top <= high + slack
            if low > -inf and row != self.limits.peaked:
                fits &= amounts[row] + self.most[row, node] >= low - slack
        return fits

    def complete(self, front: _Front) -> _Front:
        """Those of the paths that end at the sink within the limits."""
        ends = np.flatnonzero(front.node == self.dag.nodes - 1)
        done = front.part(ends)
        return done.part(np.flatnonzero(self.limits.met(done.amounts, done.peak)))


def _cuts(counts: Array) -> list[slice]:
    """Consecutive parts of at most `WIDTH` in sum, or of one."""
    ends = np.cumsum(counts)
    if not len(ends) or ends[-1] <= WIDTH or len(counts) == 1:
        return [slice(0, len(counts))]
    numbers = ends // WIDTH
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(counts)], strict=True)]


def _pruned(dag: Dag, surplus: Array, limits: Limits, room: float) -> tuple[Dag, Array]:
    """The edges that lie on a path within the room and, each limit by itself, within the limits; with their surplus."""
    while len(dag.tail):
        before, after = dag.to_nodes(surplus), dag.from_nodes(surplus)
        keep = before[dag.tail] + surplus + after[dag.head] <= room
        least = dag.to_nodes(dag.amounts)[:, dag.tail] + dag.amounts + dag.from_nodes(dag.amounts)[:, dag.head]
        most = -(dag.to_nodes(-dag.amounts)[:, dag.tail] - dag.amounts + dag.from_nodes(-dag.amounts)[:, dag.head])
        slack = 1e-12 * np.maximum(_size(limits.low), _size(limits.high))[:, None]
        keep &= (least <= limits.high[:, None] + slack).all(axis=0)
        if limits.peaked >= 0:
            most[limits.peaked] = inf
        keep &= (most >= limits.low[:, None] - slack).all(axis=0)
        if keep.all():
            break
        where = np.flatnonzero(keep)
        dag, surplus = dag.at(where), surplus[where]
    return dag, surplus


def _size(limits: Array) -> Array:
    return np.where(np.isfinite(limits), np.abs(limits), 0.0)
