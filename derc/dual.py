"""The best bound that prices on the limited amounts give: the Lagrangian dual of the cheapest path within limits.

Kelley's cutting planes in column form (Dantzig and Wolfe 1960): the master program over the paths found so far is
solved by the revised simplex method, in as many rows as there are limits; each new path is one sweep over the graph.
Prices are asked for halfway to the best ones known (in-out separation, Ben-Ameur and Neto 2007).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from derc.artifacts import Array
from derc.dag import Dag, Limits

ROUNDS = 200
"""Paths that are priced at most; any prices give a bound, so that stopping early is safe."""
CLOSE = 1e-5
"""Share of the costs' range up to which bound and master may differ."""
DEAR = 1e4
"""Price of missing a limit by its own size, in ranges of the costs."""


@dataclass(frozen=True, eq=False)
class Dual:
    """No path within the limits costs less than `bound`; `prices` (resources) are per unit, negative at lower limits.

    A path's cost at these prices is Σ weights + `constant`. `paths` are the edges of those found on the way.
    `impossible` means that some mixture of limits is missed by every path.
    """

    bound: float
    prices: Array
    constant: float
    weights: Array
    paths: list[Array]
    impossible: bool = False


def maximise(dag: Dag, limits: Limits) -> Dual:
    """The best bound over all prices; deterministic."""
    rows = Rows.of(dag, limits)
    master = Master(len(rows.resource), *_range(dag))
    best, prices, paths = -np.inf, np.zeros(len(rows.resource)), list[Array]()
    asked = prices
    for _ in range(ROUNDS if len(prices) else 1):
        value, path = rows.ask(dag, asked)
        paths.append(path)
        better = value > best
        if better:
            best, prices = value, asked
        master.add(float(dag.cost[path].sum()), rows.excess(dag, path))
        wanted, above = master.solve()
        if above - best <= CLOSE * master.spread:
            break
        asked = (wanted + prices) / 2 if better else wanted
    return _finished(dag, rows, best, prices, master, paths)


def _range(dag: Dag) -> tuple[float, float]:
    """The least and the largest cost of a path."""
    return float(dag.from_nodes(dag.cost)[0]), -float(dag.from_nodes(-dag.cost)[0])


def _finished(dag: Dag, rows: Rows, best: float, prices: Array, master: Master, paths: list[Array]) -> Dual:
    impossible = False
    if master.missed:
        direction = master.prices / max(float(master.prices.max()), 1e-300)
        least = float(dag.from_nodes(rows.signed(direction) @ dag.amounts)[0]) - float(direction @ rows.offset)
        impossible = least > 1e-9 * max(1.0, float(np.abs(direction @ rows.offset)))
    signed = rows.signed(master.prices if impossible else prices)
    weights = dag.cost + signed @ dag.amounts
    return Dual(best, signed, -float(prices @ rows.offset), weights, paths, impossible)


@dataclass(frozen=True, eq=False)
class Rows:
    """The finite limits as rows sign · amount / size ≤ `offset`."""

    resource: Array
    sign: Array
    size: Array
    offset: Array
    resources: int

    @classmethod
    def of(cls, dag: Dag, limits: Limits) -> Rows:
        """Sizes are those of the limits, or what the paths take where a limit is 0."""
        upper, lower = np.flatnonzero(np.isfinite(limits.upper)), np.flatnonzero(np.isfinite(limits.lower))
        resource = np.concatenate([upper, lower]).astype(int)
        sign = np.concatenate([np.ones(len(upper)), -np.ones(len(lower))])
        limit = np.concatenate([limits.high[upper], limits.low[lower]])
        typical = np.abs(dag.amounts[resource]).max(axis=1, initial=0.0)
        size = np.where(np.abs(limit) > 1e-12, np.abs(limit), np.where(typical > 0, typical, 1.0))
        return cls(resource, sign, size, sign * limit / size, len(dag.amounts))

    def signed(self, prices: Array) -> Array:
        """Prices of the resources, (resources), from those of the rows."""
        return np.bincount(self.resource, prices * self.sign / self.size, self.resources)

    def ask(self, dag: Dag, prices: Array) -> tuple[float, Array]:
        """The bound at `prices`, and the path that attains it."""
        weights = dag.cost + self.signed(prices) @ dag.amounts
        onward = dag.from_nodes(weights)
        return float(onward[0]) - float(prices @ self.offset), dag.path(weights, onward)

    def excess(self, dag: Dag, path: Array) -> Array:
        """By how much a path is above each limit, in limits."""
        amounts = dag.amounts[:, path].sum(axis=1)[self.resource]
        above: Array = self.sign * amounts / self.size - self.offset
        return above


@dataclass
class Master:
    """min Σ wᵢ costᵢ + dear · missed  over mixtures w of paths whose excess is at most what is missed.

    Columns: the slack of each row, what is missed of each row, then the paths.
    """

    rows: int
    least: float
    most: float
    columns: list[Array] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    basis: list[int] = field(default_factory=list)
    prices: Array = field(default_factory=lambda: np.zeros(0))
    missed: bool = False

    @property
    def spread(self) -> float:
        return max(self.most - self.least, 1e-9 * max(abs(self.most), 1.0))

    def add(self, cost: float, excess: Array) -> None:
        """One more path; the first one also sets up the basis."""
        if not self.columns:
            unit = np.vstack([np.eye(self.rows), np.zeros(self.rows)]) if self.rows else np.zeros((1, 0))
            self.columns = [*unit.T, *(-unit.T)]
            self.costs = [0.0] * self.rows + [DEAR * self.spread] * self.rows
            self.basis = [row if excess[row] <= 0 else self.rows + row for row in range(self.rows)]
            self.basis.append(len(self.columns))
        self.columns.append(np.append(excess, 1.0))
        self.costs.append(cost)

    def solve(self) -> tuple[Array, float]:
        """Optimal prices of the rows and the value, over the columns so far."""
        table, costs = np.array(self.columns).T, np.array(self.costs)
        right = np.append(np.zeros(self.rows), 1.0)
        for step in range(50 * (self.rows + 1)):
            inside = table[:, self.basis]
            dual = np.linalg.solve(inside.T, costs[self.basis])
            reduced = costs - dual @ table
            reduced[self.basis] = 0
            wrong = np.flatnonzero(reduced < -1e-12 * max(self.spread, abs(self.most)))
            if not len(wrong):
                break
            enter = int(wrong[0] if step > 20 * (self.rows + 1) else np.argmin(reduced))  # Bland's rule ends cycles
            held, rate = np.linalg.solve(inside, np.column_stack([right, table[:, enter]])).T
            steps = np.where(rate > 1e-11, np.maximum(held, 0) / np.where(rate > 1e-11, rate, 1), np.inf)
            if not np.isfinite(steps).any():
                break
            self.basis[int(np.argmin(steps))] = enter
        held = np.linalg.solve(table[:, self.basis], right)
        places = np.array(self.basis)
        artificial = (places >= self.rows) & (places < 2 * self.rows)
        self.missed = bool((held[artificial] > 1e-9).any())
        self.prices = np.maximum(-dual[: self.rows], 0)
        return self.prices, float(costs[self.basis] @ held)
