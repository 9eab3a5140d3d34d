"""Very many candidates for each of a few positions: costs of all pairs in factors, looked at piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc.artifacts import Array
from derc.dag import Dag

TILE = 512, 512
"""Pairs that are computed together, rows and columns; memory stays within a few of them."""
NARROW = 64
"""Rows that are computed together with all columns."""
ROUNDING = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Costs of going from a candidate (row) to one of the next position (column): the sum of what is given here.

    `left` (rows, r) · `right` (columns, r); `table` (1 + resources, given types, taken types) by what the row `gives`
    (rows) and the column `takes` (columns), the cost first, then what it takes of each resource; `dense` (rows,
    columns). All pairs are allowed; float32 will do.
    """

    left: Array
    right: Array
    gives: Array
    takes: Array
    table: Array
    dense: Array | None = None

    def exact(self, rows: Array, columns: Array) -> tuple[Array, Array]:
        """Cost (n) and amounts (resources, n) of n pairs, in float64."""
        left, right = self.left[rows].astype(np.float64), self.right[columns].astype(np.float64)
        typed = self.table[:, self.gives[rows], self.takes[columns]].astype(np.float64)
        cost = np.einsum("er,er->e", left, right) + typed[0]
        return cost if self.dense is None else cost + self.dense[rows, columns], typed[1:]

    @property
    def dearest(self) -> float:
        """What no pair costs more than."""
        longest = [
            np.sqrt((part.astype(np.float64) ** 2).sum(axis=1).max(initial=0)) for part in (self.left, self.right)
        ]
        dense = 0.0 if self.dense is None else float(self.dense.max(initial=0))
        return float(longest[0] * longest[1] + self.table[0].max(initial=0)) + dense

    def factors(self, prices: Array) -> tuple[Array, Array]:
        """Factors of the costs at `prices` (resources), but for the dense part: (rows, k) and (columns, k)."""
        priced = self.table[0] + np.tensordot(prices, self.table[1:], 1)
        taken = np.zeros((len(self.takes), priced.shape[1]), np.float32)
        taken[np.arange(len(self.takes)), self.takes] = 1
        left = np.hstack([self.left, priced[self.gives]]).astype(np.float32)
        return left, np.hstack([self.right, taken]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Wide:
    """One candidate is taken at each position: its `cost` (candidates) and `amounts` (resources, candidates).

    `pairs[k]` are between positions k and k + 1.
    """

    cost: tuple[Array, ...]
    amounts: tuple[Array, ...]
    pairs: tuple[Pairs, ...]

    @property
    def positions(self) -> int:
        return len(self.cost)

    @cached_property
    def every(self) -> tuple[Array, ...]:
        """All candidates of each position."""
        return tuple(np.arange(len(cost)) for cost in self.cost)

    @property
    def dearest(self) -> float:
        """What no path costs more than."""
        return float(sum(cost.max() for cost in self.cost) + sum(pairs.dearest for pairs in self.pairs))

    def dag(self, chosen: tuple[Array, ...], edges: Sequence[tuple[Array, Array]] = ()) -> tuple[Dag, Array]:
        """The graph of the `chosen` candidates alone, and which candidate each edge leads to (−1: the sink).

        `edges` are the pairs between each position and the next, as places in `chosen`, sorted; none: all.
        """
        sizes = [len(part) for part in chosen]
        starts = np.concatenate([[1], 1 + np.cumsum(sizes)])
        tails, heads = [np.zeros(sizes[0], int)], [starts[0] + np.arange(sizes[0])]
        costs, amounts = [self.cost[0][chosen[0]].astype(float)], [self.amounts[0][:, chosen[0]].astype(float)]
        for k, pairs in enumerate(self.pairs):
            rows, columns = edges[k] if edges else map(np.ravel, np.indices((sizes[k], sizes[k + 1])))
            cost, amount = pairs.exact(chosen[k][rows], chosen[k + 1][columns])
            tails.append(starts[k] + rows)
            heads.append(starts[k + 1] + columns)
            costs.append(cost + self.cost[k + 1][chosen[k + 1][columns]])
            amounts.append(amount + self.amounts[k + 1][:, chosen[k + 1][columns]])
        last = starts[-2] + np.arange(sizes[-1])
        tail, head = np.concatenate([*tails, last]), np.concatenate([*heads, np.full(len(last), starts[-1])])
        leads = np.concatenate([*chosen, [-1]])[head - 1]
        free = np.zeros(len(last))
        return Dag(
            level=np.repeat(np.arange(self.positions + 2), [1, *sizes, 1]),
            tail=tail,
            head=head,
            cost=np.concatenate([*costs, free]),
            amounts=np.hstack([*amounts, np.zeros((len(self.amounts[0]), len(last)))]),
            peak=np.zeros(len(tail)),
            names=np.arange(len(tail)),
        ), leads

    def through(self, active: tuple[Array, ...], prices: Array) -> tuple[tuple[Array, ...], tuple[Array, ...], float]:
        """For each active candidate the least cost at `prices` of a path before it, itself included, and after it.

        Third, how far float32 may have put their sums off.
        """
        own = [self.cost[k][a] + prices @ self.amounts[k][:, a] for k, a in enumerate(active)]
        factors = [pairs.factors(prices) for pairs in self.pairs]
        before, after, error = [own[0]], [np.zeros(len(active[-1]))], 0.0
        for k, (left, right) in enumerate(factors):
            least, off = _least(left[active[k]], right[active[k + 1]], before[-1], self._dense(k, active))
            before.append(least + own[k + 1])
            error += off
        for k in reversed(range(len(factors))):
            left, right = factors[k]
            dense = self._dense(k, active)
            least, off = _least(
                right[active[k + 1]], left[active[k]], after[0] + own[k + 1], None if dense is None else dense.T
            )
            after.insert(0, least)
            error += off
        return tuple(before), tuple(after), error

    def _dense(self, k: int, active: tuple[Array, ...]) -> Array | None:
        dense = self.pairs[k].dense
        if dense is None:
            return None
        whole = len(active[k]) == dense.shape[0] and len(active[k + 1]) == dense.shape[1]
        return dense if whole else dense[np.ix_(active[k], active[k + 1])]

    def near(
        self,
        active: tuple[Array, ...],
        prices: Array,
        before: Sequence[Array],
        after: Sequence[Array],
        level: float,
        every: int = 1,
    ) -> Iterator[tuple[int, Array, Array, Array]]:
        """The pairs, as places in `active`, on a path that costs at most `level` at `prices`, piece by piece.

        Yields the position, rows, columns and the costs of the paths; of the rows only one in `every` is looked at.
        """
        least = float(before[-1].min())
        for k, pairs in enumerate(self.pairs):
            left, right = (f[a] for f, a in zip(pairs.factors(prices), active[k : k + 2], strict=True))
            own = self.cost[k + 1][active[k + 1]] + prices @ self.amounts[k + 1][:, active[k + 1]]
            rows, dense = np.arange(0, len(left), every), self._dense(k, active)
            columns = np.hstack([right, np.ones((len(right), 1)), (own + after[k + 1] - least)[:, None]])
            columns = columns.astype(np.float32).T
            ahead = np.hstack([left, before[k][:, None], np.ones((len(left), 1))]).astype(np.float32)
            for start in range(0, len(rows), NARROW):
                part = rows[start : start + NARROW]
                costs = ahead[part] @ columns
                if dense is not None:
                    costs += dense[part]
                places = np.flatnonzero(costs.ravel() <= level - least)
                row, column = np.divmod(places, costs.shape[1])
                yield k, part[row], column, costs.ravel()[places] + least


def _least(left: Array, right: Array, before: Array, dense: Array | None) -> tuple[Array, float]:
    """min over rows of left · right + dense + before, (columns) in float64, and a bound of its rounding error."""
    base = float(before.min())
    rest = np.minimum(before - base, 1e30).astype(np.float32)
    rows = np.hstack([left, rest[:, None]])
    columns = np.hstack([right, np.ones((len(right), 1), np.float32)])
    least = np.full(len(columns), np.inf, np.float32)
    for first in range(0, len(columns), TILE[1]):
        part = columns[first : first + TILE[1]].T
        for start in range(0, len(rows), TILE[0]):
            costs = rows[start : start + TILE[0]] @ part
            if dense is not None:
                costs += dense[start : start + TILE[0], first : first + TILE[1]]
            np.minimum(least[first : first + TILE[1]], costs.min(axis=0), out=least[first : first + TILE[1]])
    size = float(np.abs(left).max(initial=0) * np.abs(right).sum(axis=1).max(initial=0)) + float(np.ptp(before))
    largest = 0.0 if dense is None else float(np.abs(dense).max(initial=0))
    return least.astype(np.float64) + base, ROUNDING * (rows.shape[1] + 4) * (size + largest)
