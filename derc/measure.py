"""How latency is measured: warm-up, interleaved rounds, an anchor with an A/A control, a stop rule on the median."""

from __future__ import annotations

import math
import random
import time
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import median

from derc.artifacts import Latency
from derc.errors import DercError

Candidate = Callable[[], float]
Track = Callable[[Iterable[str], str, int], Iterable[str]]

PERCENTILES = {50: 11, 90: 64, 99: 662}
"""Percentile → samples needed to state it at 99% confidence (MLPerf early stopping)."""


@dataclass(frozen=True)
class MeasureOptions:
    """When a median counts as known: its `confidence` half-width is at most `precision` of it, or `limit_s` is over.

    Warm-up of a candidate is `warmup_runs` runs and `warmup_s` seconds, cut short once it has settled: the fastest of
    its last `warmup_runs` runs is no more than 2% faster than the fastest of those before.

    Each sample follows up to `rewarm_runs` runs that do not count, fewer once they have taken `rewarm_s` seconds: then
    caches are as in a server's loop and a sample does not depend on who ran before (without, sixty small networks in
    turn look 1.6 to 4 times slower than each alone).

    Nothing settles before rounds have run for `span_s` (at most a quarter of the limit): a burst of samples from one
    quiet moment agrees with itself only. `limit_s` includes the warm-up.
    """

    warmup_runs: int = 10
    warmup_s: float = 0.2
    rewarm_runs: int = 4
    rewarm_s: float = 5e-3
    precision: float = 0.01
    confidence: float = 0.95
    min_samples: int = 30
    span_s: float = 2.0
    limit_s: float = 30.0
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate; `low` … `high` is the interval of the median, `samples` are all, in order of time."""

    median: float
    low: float
    high: float
    stable: bool
    samples: tuple[float, ...]

    @property
    def percentiles(self) -> dict[int, float]:
        """p50, p90, p99 in seconds, each only where there are samples enough to state it."""
        ordered = sorted(self.samples)
        return {p: ordered[math.ceil(p / 100 * len(ordered)) - 1] for p, n in PERCENTILES.items() if len(ordered) >= n}

    def latency(self) -> Latency:
        """The same in milliseconds, as a measured latency."""
        return Latency(
            self.median * 1e3, self.low * 1e3, self.high * 1e3, samples=len(self.samples), stable=self.stable
        )


@dataclass(frozen=True)
class Measurement:
    """Timings by candidate; `control` is the candidate `anchor` measured a second time under another name."""

    timings: dict[str, Timing]
    anchor: str
    control: Timing

    @property
    def noise(self) -> float:
        """Relative difference of the anchor's two medians: what a difference must exceed to mean anything."""
        return relative(self.timings[self.anchor].median, self.control.median)


def measure(
    candidates: Mapping[str, Candidate],
    options: MeasureOptions | None = None,
    *,
    anchor: str | None = None,
    track: Track = lambda items, _label, _total: items,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Measure all candidates against each other; calling one runs it once and returns its seconds.

    Each round takes one sample of every candidate and of the control, in random order. A candidate that has settled
    goes on: one that left early would be compared with others' times under another load. `anchor` defaults to the
    candidate of median warm-up time. What has not settled when time is out is kept with stable=False and its wider
    interval. Raises DercError where there are no candidates.
    """
    if not candidates:
        raise DercError("there is nothing to measure")
    options = options or MeasureOptions()
    start = clock()
    hints = {name: _warm_up(run, options, clock) for name, run in candidates.items()}
    anchor = anchor if anchor is not None else sorted(hints, key=lambda name: hints[name])[(len(hints) - 1) // 2]
    series = {name: _Series(run) for name, run in candidates.items()}
    control = _Series(candidates[anchor])
    rounds = _rounds(series, control, options, lambda: clock() - start)
    for _ in track(rounds, "measure", len(series)):
        pass
    timings = {name: one.timing(options) for name, one in series.items()}
    return Measurement(timings, anchor, control.timing(options))


def relative(a: float, b: float) -> float:
    """|a − b| over their mean; 0 where both are 0."""
    return 2 * abs(a - b) / (a + b) if a + b else 0.0


@cache
def interval_rank(n: int, confidence: float = 0.95) -> int:
    """Rank k (from 1) such that order statistics k and n + 1 − k hold the median with at least `confidence`; 0 if none.

    Distribution-free: the number of samples below the median is binomial (n, ½).
    """
    tail, total = (1 - confidence) / 2, 0.0
    for rank in range(n // 2 + 1):
        log = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1) - n * math.log(2)
        total += math.exp(log)
        if total > tail:
            return rank
    return 0


@dataclass
class _Series:
    """The samples of one candidate, in order of time and sorted."""

    run: Candidate
    samples: list[float] = field(default_factory=list)
    ordered: list[float] = field(default_factory=list)

    def add(self, options: MeasureOptions) -> None:
        runs, spent = 0, 0.0
        while runs < options.rewarm_runs and spent < options.rewarm_s:
            spent += self.run()
            runs += 1
        seconds = self.run()
        self.samples.append(seconds)
        insort(self.ordered, seconds)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Interval of the median in seconds; open above where there are too few samples for one."""
        rank = interval_rank(len(self.ordered), confidence)
        return (self.ordered[rank - 1], self.ordered[-rank]) if rank else (0.0, math.inf)

    def settled(self, options: MeasureOptions) -> bool:
        low, high = self.interval(options.confidence)
        enough = len(self.ordered) >= options.min_samples
        return enough and high - low <= 2 * options.precision * median(self.ordered)

    def timing(self, options: MeasureOptions) -> Timing:
        low, high = self.interval(options.confidence)
        if math.isinf(high):
            low, high = self.ordered[0], self.ordered[-1]
        return Timing(median(self.ordered), low, high, self.settled(options), tuple(self.samples))


def _warm_up(run: Candidate, options: MeasureOptions, clock: Callable[[], float]) -> float:
    """Warm one candidate up; its median over the last runs in seconds."""
    start, seen, window = clock(), list[float](), max(1, options.warmup_runs)
    while len(seen) < window or clock() - start < options.warmup_s:
        seen.append(run())
        if len(seen) >= 2 * window and min(seen[-window:]) > 0.98 * min(seen[:-window]):
            break
    return median(seen[-window:])


def _rounds(
    series: Mapping[str, _Series], control: _Series, options: MeasureOptions, elapsed: Callable[[], float]
) -> Iterator[str]:
    """Run rounds until all have settled at one look or time is out; yields each name when it first has.

    Looks come at 5% more rounds each time: fewer looks, fewer lucky stops.
    """
    order, turn = random.Random(options.seed), [control, *series.values()]
    least = next(n for n in range(1, 10_000) if interval_rank(n, options.confidence))
    free = elapsed() + min(options.span_s, options.limit_s / 4)
    waiting, rounds, look = dict.fromkeys(series), 0, options.min_samples
    while rounds < least or elapsed() < options.limit_s:
        order.shuffle(turn)
        for one in turn:
            one.add(options)
        rounds += 1
        if rounds < look or elapsed() < free:
            continue
        look = math.ceil(1.05 * rounds)
        settled = {name for name, one in series.items() if one.settled(options)}
        for name in [name for name in waiting if name in settled]:
            del waiting[name]
            yield name
        if len(settled) == len(series):
            break
    yield from waiting
