"""The cheapest paths within limits, with a certificate: a bound, a threshold, enumeration, and a larger threshold.

Plain dominance between partial paths would be wrong where limits are two-sided; nothing here relies on it. All paths
that cost at most a threshold are found, so that what is chosen among them in order of cost is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from derc.artifacts import Array
from derc.dag import Dag, Limits
from derc.dual import Dual, maximise
from derc.enumeration import NOTHING, Apart, Found, beam, enumerate_paths

BEAM = 2000
"""Paths that the beam follows, which finds the first threshold."""
NEAR = 0.7
"""Share of the beam's best distance from the bound that the first threshold has at least."""
GROWTH = (1.1, 1.7, 3.0)
"""Least factor by which the threshold's distance from the bound grows, the largest, and that after a small pass."""
SMALL = 20_000
"""Paths begun in a small pass."""

Choose = Callable[[Found, float], int]
"""Takes the paths found, cheapest first, that cost at most the threshold; returns how many answers there are now."""


@dataclass(frozen=True)
class Outcome:
    """`status` is certified, exhausted (every path was looked at), or time (out before either).

    No path costs less than `bound`; all that cost at most `threshold` were among those chosen from. `begun` counts the
    paths begun in all passes, `prices` (resources) are those of the bound, or of what no path can meet.
    """

    status: str
    bound: float
    threshold: float
    begun: int = 0
    prices: Array | None = None


def cheapest(
    dag: Dag,
    limits: Limits,
    wanted: int,
    choose: Choose,
    *,
    apart: Callable[[], Apart | None] = lambda: None,
    deadline: float = inf,
) -> Outcome:
    """Find paths in order of cost until `choose` has `wanted` answers; it is handed a complete list each time.

    The list is that of all paths where the threshold is inf. `apart` is asked before each pass for what the paths must
    keep apart from. With the time out, `choose` gets what was found with −inf, as it does before the first pass.
    """
    dag = _within(dag, limits)
    dual = maximise(dag, _relaxed(dag, limits)) if len(dag.tail) else None
    if dual is None or dual.impossible:
        choose(NOTHING, inf)
        return Outcome("exhausted", inf, inf, prices=dual.prices if dual else None)
    return replace(_deepen(dag, limits, dual, wanted, choose, apart, deadline), prices=dual.prices)


def _within(dag: Dag, limits: Limits) -> Dag:
    """The edges on paths, none of which has by itself too large a peak."""
    if limits.peaked >= 0:
        dag = dag.kept(dag.peak <= limits.high[limits.peaked])
    return dag.kept(dag.connected)


def _relaxed(dag: Dag, limits: Limits) -> Limits:
    """Limits for sums alone: every path has the least peak at least."""
    if limits.peaked < 0:
        return limits
    upper, lower = limits.upper.copy(), limits.lower.copy()
    upper[limits.peaked] = limits.high[limits.peaked] - float(dag.from_nodes(dag.peak, np.maximum, -inf)[0])
    lower[limits.peaked] = -inf
    return replace(limits, upper=upper, lower=lower)


def _deepen(
    dag: Dag,
    limits: Limits,
    dual: Dual,
    wanted: int,
    choose: Choose,
    apart: Callable[[], Apart | None],
    deadline: float,
) -> Outcome:
    top = -float(dag.from_nodes(-dag.cost)[0])
    some = beam(dag, limits, dual, top, BEAM, apart())
    have = choose(some, -inf)
    ceiling = float(some.costs[min(wanted, len(some.costs)) - 1]) if have else top
    room, begun, proved = _first(dag, dual, wanted), some.begun, dual.bound
    if len(some.costs):
        room = max(room, NEAR * (float(some.costs[0]) - dual.bound))
    while True:
        threshold = min(dual.bound + room, top)
        if threshold > ceiling > proved:
            threshold = ceiling
        found = enumerate_paths(dag, limits, dual, threshold, apart(), deadline)
        begun += found.begun
        done = inf if threshold >= top else threshold
        have = choose(found, done if found.complete else -inf)
        if not found.complete:
            return Outcome("time", proved, proved, begun)
        if have >= wanted:
            return Outcome("certified", dual.bound, threshold, begun)
        if threshold >= top:
            return Outcome("exhausted", dual.bound, inf, begun)
        proved = threshold
        room = max(room, threshold - dual.bound) * _growth(have, wanted, found.begun)


def _growth(have: int, wanted: int, begun: int) -> float:
    """Factor for the room: the number of answers grows about as its fourth power, and a small pass costs nothing."""
    most = GROWTH[1] if begun > SMALL else GROWTH[2]
    return float(np.clip((1.2 * wanted / have) ** 0.25, GROWTH[0], most)) if have else most


def _first(dag: Dag, dual: Dual, wanted: int) -> float:
    """Room that leaves about as many edges as answers are wanted on the best path through each."""
    before, after = dag.to_nodes(dual.weights), dag.from_nodes(dual.weights)
    through: Array = np.sort(before[dag.tail] + dual.weights + after[dag.head]) - after[0]
    least = 1e-7 * max(abs(float(after[0])), abs(dual.bound), 1e-12)
    return max(float(through[min(wanted, len(through) - 1)]), least)
