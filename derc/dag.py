"""Steps in layers with costs and amounts, and the sweeps over all of its paths that searches are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from derc.artifacts import Array


@dataclass(frozen=True, eq=False)
class Dag:
    """Edges from `tail` to `head`, sorted by tail; node 0 is the source, the last node the sink.

    `level` (nodes) does not fall with the node's number and rises along every edge. `cost` is (edges), `amounts`
    (resources, edges), `peak` (edges) what counts by its largest on a path, `names` (edges) the edges' numbers outside.
    """

    level: Array
    tail: Array
    head: Array
    cost: Array
    amounts: Array
    peak: Array
    names: Array

    @property
    def nodes(self) -> int:
        return len(self.level)

    @cached_property
    def first(self) -> Array:
        """Where each node's leaving edges begin, (nodes + 1)."""
        return np.searchsorted(self.tail, np.arange(self.nodes + 1))

    @cached_property
    def _entering(self) -> list[tuple[Array, Array, Array, Array]]:
        """By level of the head: edges sorted by head, their tails, where each head's begin, the heads."""
        order = np.argsort(self.head, kind="stable")
        heads = self.head[order]
        bounds = np.flatnonzero(np.diff(self.level[heads], prepend=-1, append=-1)) if len(order) else np.zeros(1, int)
        groups = []
        for low, high in pairwise(bounds):
            starts = np.flatnonzero(np.diff(heads[low:high], prepend=-1))
            edges = order[low:high]
            groups.append((edges, self.tail[edges], starts, heads[low:high][starts]))
        return groups

    @cached_property
    def _leaving(self) -> list[tuple[slice, Array, Array]]:
        """By level of the tail, last first: the edges, where each tail's begin, the tails."""
        bounds = np.flatnonzero(np.diff(self.level[self.tail], prepend=-1, append=-1)) if len(self.tail) else [0]
        groups = []
        for low, high in pairwise(bounds):
            starts = np.flatnonzero(np.diff(self.tail[low:high], prepend=-1))
            groups.append((slice(low, high), starts, self.tail[low:high][starts]))
        return groups[::-1]

    def to_nodes(self, weights: Array) -> Array:
        """Least sum of `weights` (…, edges) from the source to each node, (…, nodes); inf where no path leads."""
        least = np.full((*weights.shape[:-1], self.nodes), np.inf)
        least[..., 0] = 0
        for edges, tails, starts, heads in self._entering:
            least[..., heads] = np.minimum.reduceat(least[..., tails] + weights[..., edges], starts, axis=-1)
        return least

    def from_nodes(self, weights: Array, join: Callable[..., Any] = np.add, end: float = 0.0) -> Array:
        """Least sum of `weights` (…, edges) from each node to the sink, (…, nodes); inf where no path leads.

        `join` takes the place of the sum, and `end` of its 0 at the sink.
        """
        least = np.full((*weights.shape[:-1], self.nodes), np.inf)
        least[..., -1] = end
        for edges, starts, tails in self._leaving:
            onward = join(weights[..., edges], least[..., self.head[edges]])
            least[..., tails] = np.minimum.reduceat(onward, starts, axis=-1)
        return least

    def path(self, weights: Array, onward: Array) -> Array:
        """Edges of the path of least `weights`, where `onward` is what `from_nodes` gives for them."""
        node, edges = 0, list[int]()
        while node != self.nodes - 1:
            part = slice(int(self.first[node]), int(self.first[node + 1]))
            edges.append(part.start + int(np.argmin(weights[part] + onward[self.head[part]])))
            node = int(self.head[edges[-1]])
        return np.array(edges)

    def kept(self, edges: Array) -> Dag:
        """The same nodes with the marked edges alone."""
        return self.at(np.flatnonzero(edges))

    def at(self, where: Array) -> Dag:
        """The edges numbered `where`, in that order, in which their tails do not fall."""
        return Dag(
            self.level,
            self.tail[where],
            self.head[where],
            self.cost[where],
            self.amounts[:, where],
            self.peak[where],
            self.names[where],
        )

    @property
    def connected(self) -> Array:
        """Marks the edges that lie on a path from source to sink."""
        free = np.zeros(len(self.tail))
        before, after = self.to_nodes(free), self.from_nodes(free)
        marked: Array = np.isfinite(before[self.tail]) & np.isfinite(after[self.head])
        return marked


@dataclass(frozen=True, eq=False)
class Limits:
    """Amounts of a path must lie in [`lower`, `upper`] (resources), ±inf where free, up to a share `slack` of each.

    `peaked` names the resource to which the largest peak on the path is added, −1: none.
    """

    lower: Array
    upper: Array
    peaked: int = -1
    slack: float = 1e-9

    @cached_property
    def low(self) -> Array:
        """The lower limits with their slack."""
        return np.where(np.isfinite(self.lower), self.lower - self.slack * np.abs(self.lower), -np.inf)

    @cached_property
    def high(self) -> Array:
        """The upper limits with their slack."""
        return np.where(np.isfinite(self.upper), self.upper + self.slack * np.abs(self.upper), np.inf)

    def met(self, amounts: Array, peak: Array) -> Array:
        """Marks which of the columns of `amounts` (resources, n) with `peak` (n) are within all limits."""
        total = amounts
        if self.peaked >= 0:
            total = amounts.copy()
            total[self.peaked] += peak
        marked: Array = np.all((total >= self.low[:, None]) & (total <= self.high[:, None]), axis=0)
        return marked
