"""The cheapest of very many paths: prices and a threshold from a few candidates, which leave few of all the others.

Any prices bound every path; what costs more at them than the threshold, below which enough paths are known already,
is left out for good. What is left is searched as any other graph is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np

from derc.artifacts import Array
from derc.dag import Limits
from derc.enumeration import MARGIN, NOTHING, Found
from derc.errors import DercError
from derc.paths import cheapest
from derc.wide import Wide

SAMPLE = 100
"""Candidates of each position among which the first prices and the first threshold are looked for."""
EDGES = 60_000
"""Pairs that are searched at once in the first round."""
MOST_EDGES = 20_000_000
"""Pairs that are searched at once at all."""
GROWTH = 4
"""Factor by which their number grows from round to round."""
ROUNDS = 12


@dataclass(frozen=True, eq=False)
class Cheapest:
    """`candidates` (n, positions) of the cheapest paths, their `costs` (n), and whether these are proved to be all.

    No path costs less than `bound`. `left` are the candidates of each position that were not ruled out.
    """

    candidates: Array
    costs: Array
    status: str
    bound: float
    left: tuple[int, ...]

    @property
    def certified(self) -> bool:
        """Whether nothing cheaper exists than what is here."""
        return self.status in ("certified", "exhausted")


def cheapest_wide(wide: Wide, limits: Limits, wanted: int, *, deadline: float = inf) -> Cheapest:
    """The `wanted` cheapest paths within `limits`, best first; fewer where there are fewer.

    `deadline` is on the clock of `time.monotonic`. Deterministic, whatever the number of threads. Raises DercError
    where what is left is too much to search.
    """
    few, active, taken = _spread(wide, SAMPLE), wide.every, _Taking(wanted, np.zeros(len(limits.upper)))
    if _pairs(tuple(map(len, active))) <= EDGES:
        return _searched(wide, limits, active, (), taken, deadline)
    _searched(wide, limits, few, (), taken, deadline)
    prices = taken.prices
    for round_ in range(ROUNDS):
        before, after, error = wide.through(active, prices)
        constant, threshold = _constant(limits, prices), taken.last
        slack = MARGIN * (1 + abs(threshold if threshold < inf else 0.0)) + error + constant
        if float(before[-1].min()) - error - constant > wide.dearest:
            return _nothing(wide)
        kept = [b + a <= threshold + slack for b, a in zip(before, after, strict=True)]
        if not all(mask.any() for mask in kept):
            return _nothing(wide)
        active, before, after = (_at(arrays, kept) for arrays in (active, before, after))
        level = min(_level(wide, active, prices, before, after, EDGES * GROWTH**round_), threshold + slack)
        edges = _edges(wide, active, prices, before, after, level)
        final = level >= threshold + slack or sum(len(rows) for rows, _ in edges) == _pairs(tuple(map(len, active)))
        found = _searched(wide, limits, active, edges, taken, deadline)
        if final or found.status == "time" or taken.last <= level - slack:
            return found
        prices = taken.prices
    raise DercError(f"{max(map(len, active))} candidates a position are left, too many to search: give tighter limits")


def _searched(
    wide: Wide,
    limits: Limits,
    active: tuple[Array, ...],
    edges: Sequence[tuple[Array, Array]],
    taken: _Taking,
    deadline: float,
) -> Cheapest:
    """The search of these edges between the active candidates."""
    dag, leads = wide.dag(active, edges)
    outcome = cheapest(dag, limits, taken.wanted, taken, deadline=deadline)
    taken.prices = outcome.prices if outcome.prices is not None else taken.prices
    best = taken.found.edges[: taken.wanted, : wide.positions]
    costs = taken.found.costs[: taken.wanted]
    candidates = leads[best] if len(best) else np.zeros((0, wide.positions), int)
    return Cheapest(candidates, costs, outcome.status, outcome.bound, tuple(map(len, active)))


def _level(
    wide: Wide, active: tuple[Array, ...], prices: Array, before: Sequence[Array], after: Sequence[Array], count: int
) -> float:
    """A cost at `prices` up to which about `count` pairs lie on paths, judged by some of the rows."""
    every = max(1, min(map(len, active)) // SAMPLE)
    share, top = count // every, inf
    seen = np.zeros(0)
    for _, _, _, costs in wide.near(active, prices, before, after, inf, every):
        seen = np.concatenate([seen, costs[costs <= top]])
        if len(seen) > 4 * share:
            seen = np.partition(seen, share)[: share + 1]
            top = float(seen.max())
    return float(np.partition(seen, share)[share]) if len(seen) > share else inf


def _edges(
    wide: Wide, active: tuple[Array, ...], prices: Array, before: Sequence[Array], after: Sequence[Array], level: float
) -> list[tuple[Array, Array]]:
    """The pairs on paths that cost at most `level` at `prices`; raises DercError where they are too many."""
    found: list[list[tuple[Array, Array]]] = [[] for _ in wide.pairs]
    count = 0
    for k, rows, columns, _ in wide.near(active, prices, before, after, level):
        found[k].append((rows, columns))
        count += len(rows)
        if count > MOST_EDGES:
            raise DercError(f"more than {MOST_EDGES} pairs are left, too many to search: give tighter limits")
    return [(np.concatenate([r for r, _ in part]), np.concatenate([c for _, c in part])) for part in found]


def _nothing(wide: Wide) -> Cheapest:
    return Cheapest(np.zeros((0, wide.positions), int), np.zeros(0), "exhausted", inf, (0,) * wide.positions)


def _constant(limits: Limits, prices: Array) -> float:
    """What a path within the limits pays at most for its amounts at `prices`."""
    dear, cheap = prices > 0, prices < 0
    return float(prices[dear] @ limits.high[dear] + prices[cheap] @ limits.low[cheap])


def _spread(wide: Wide, count: int) -> tuple[Array, ...]:
    """A few candidates of each position, evenly spread."""
    return tuple(np.unique(np.linspace(0, len(every) - 1, count).astype(int)) for every in wide.every)


def _at(arrays: Sequence[Array], kept: list[Array]) -> tuple[Array, ...]:
    return tuple(array[mask] for array, mask in zip(arrays, kept, strict=True))


def _pairs(sizes: tuple[int, ...]) -> int:
    return sum(a * b for a, b in pairwise(sizes))


@dataclass
class _Taking:
    """Takes what it is handed; `last` is the cost below which there are `wanted` paths."""

    wanted: int
    prices: Array
    found: Found = NOTHING
    last: float = inf

    def __call__(self, found: Found, threshold: float) -> int:
        self.found = found
        if len(found.costs) >= self.wanted:
            self.last = min(self.last, float(found.costs[self.wanted - 1]))
        return len(found.costs)
