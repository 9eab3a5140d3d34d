"""The Pareto front: the best network for every latency budget, from one sweep that shares its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from derc import deployed
from derc.artifacts import Array, Assembly, Latency
from derc.errors import DercError, InfeasibleError, UsageError
from derc.measure import MeasureOptions, measure
from derc.search import Judged, Search
from derc.shipping import latency_of

LOOKS = 4
"""How often what a measurement has brought to the front is matched and measured in turn."""
Improve = Callable[[Search, Sequence[Assembly]], None]
"""May replace evaluated networks of a search by better ones of the same structure."""


@dataclass(frozen=True)
class Networks:
    """Everything that a sweep evaluated on one engine, and the budgets that it went through."""

    search: Search
    budgets: tuple[float, ...]

    def latency(self, assembly: Assembly) -> Latency:
        """What is known of a network's latency; its provenance says how."""
        return latency_of(self.search, self.search.judged[assembly])


def check(points: int, evaluations: int) -> None:
    """Raise UsageError for fewer than two points or evaluations than points."""
    if points < 2:
        raise UsageError(f"--points must be at least 2, not {points}")
    if evaluations < points:
        raise UsageError(f"--evaluations {evaluations} is less than one for each of {points} points: give more")


def sweep(
    search: Search, points: int, evaluations: int, measure_s: float, improve: Improve = lambda *_: None
) -> Networks:
    """Search within `points` budgets from the fastest donor's latency to the slowest's, `evaluations` more at each.

    What one budget has taught serves the next. Then the `contenders` are improved, and where the device is here, every
    network of the front is measured whole. Raises InfeasibleError where nothing meets the other budgets.
    """
    budgets, refused = grid(search, points), None
    for place, budget in enumerate(budgets):
        search.select = replace(search.select, latency_ms=budget)
        search.evaluations = search.spent + evaluations // points + (place < evaluations % points)
        try:
            search.spend() if place else search.run()
        except InfeasibleError as error:  # margins may leave nothing below the fastest donor
            refused = error
    if refused is not None and not admitted(search):
        raise refused
    for _ in range(LOOKS):
        improve(search, contenders(search, budgets))
        best = front(search)
        known = all(latency_of(search, search.judged[a]).provenance == "measured" for a in best)
        if known or not search.context.target.present:
            break
        _measure(search, best, measure_s)
    return Networks(search, budgets)


def grid(search: Search, points: int) -> tuple[float, ...]:
    """Budgets at equal ratios from the fastest to the slowest of the donors that fit the task, in ms."""
    known = [one for name, one in search.table.donors.items() if name in search.select.heads]
    if not known:
        raise InfeasibleError("no donor that fits the task could be built for the target")
    low, high = min(one.high_ms for one in known), max(one.high_ms for one in known)
    return tuple(float(f"{budget:.6g}") for budget in np.geomspace(low, max(high, low), points))


def admitted(search: Search) -> dict[Assembly, Judged]:
    """The evaluated networks that meet the budgets beside latency's, which a sweep goes through."""
    return {assembly: one for assembly, one in search.judged.items() if search.admits(one)}


def front(search: Search) -> tuple[Assembly, ...]:
    """The evaluated networks that no other one is at least as fast and as good as, fastest first.

    Among equals in both the intact donor stays, then the one evaluated first.
    """
    judged = admitted(search)
    order = sorted(judged, key=lambda a: (latency_of(search, judged[a]).ms, -judged[a].scores.value, not a.intact))
    kept, best = list[Assembly](), -np.inf
    for assembly in order:
        if judged[assembly].scores.value > best:
            kept.append(assembly)
            best = judged[assembly].scores.value
    return tuple(kept)


def contenders(search: Search, budgets: Sequence[float]) -> tuple[Assembly, ...]:
    """The front, and the best assembly within each of the budgets, for it may come to the front if it is improved."""
    found = dict.fromkeys(front(search))
    others = [a for a in admitted(search) if not a.intact]
    for budget in budgets:
        within = [a for a in others if latency_of(search, search.judged[a]).ms <= budget]
        if within:
            found[max(within, key=lambda a: search.judged[a].scores.value)] = None
    return tuple(found)


def _measure(search: Search, assemblies: Sequence[Assembly], limit_s: float) -> None:
    """Build and measure networks, donors among them, in the same rounds; what cannot be built is left out for good."""
    context = search.context
    with ExitStack() as stack:
        calls = {}
        for assembly in context.console.track(assemblies, "build", len(assemblies)):
            try:
                model = deployed.model_of(context, search.judged[assembly].stitched)
                session = context.builder.session(model, str(assembly))
            except DercError as error:
                search.refuse(assembly, str(error))
                continue
            stack.callback(session.close)
            calls[assembly] = session.time
        if not calls:
            return
        named = {str(assembly): call for assembly, call in calls.items()}
        timings = measure(named, MeasureOptions(limit_s=limit_s), track=context.console.track).timings
    for assembly in calls:
        search.record(assembly, timings[str(assembly)].latency())


def hypervolume(points: Iterable[tuple[float, float]], slowest: float, fastest: float) -> float:
    """Area under the best score within each latency, over log latency from `fastest` to `slowest` ms, as a mean score.

    `points` are (ms, score); scores are in [0, 1], and 0 where nothing is fast enough.
    """
    rows = sorted((max(ms, fastest), score) for ms, score in points if ms <= slowest)
    if not rows or slowest <= fastest:
        return max((score for _, score in rows), default=0.0)
    places: Array = np.log([ms for ms, _ in rows] + [slowest])
    best = np.maximum.accumulate([max(score, 0.0) for _, score in rows])
    return float(np.sum(np.diff(places) * best) / np.log(slowest / fastest))
