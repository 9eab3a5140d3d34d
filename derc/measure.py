"""How latency is measured: warm-up, interleaved rounds, an anchor with an A/A control, a stop rule on the median."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import median

import numpy as np

from derc.artifacts import Array, Latency
from derc.errors import DercError

Candidate = Callable[[], float]
Track = Callable[[Iterable[str], str, int], Iterable[str]]

PERCENTILES = {50: 11, 90: 64, 99: 662}
"""Percentile → samples needed to state it at 99% confidence (MLPerf early stopping)."""
LEAST_LIMIT_S = 40.0
"""Seconds that a measurement without a limit of its own may take at least."""


@dataclass(frozen=True)
class MeasureOptions:
    """When a median counts as known: its `confidence` half-width is at most `precision` of it, or `limit_s` is over.

    Warm-up of a candidate is `warmup_runs` runs and `warmup_s` seconds, cut short once it has settled: the fastest of
    its last `warmup_runs` runs is no more than 2% faster than the fastest of those before.

    Each sample follows up to `rewarm_runs` runs that do not count, fewer once they have taken `rewarm_s` seconds: then
    caches are as in a server's loop and a sample does not depend on who ran before (without, sixty small networks in
    turn look 1.6 to 4 times slower than each alone).

    Nothing settles before rounds have run for `span_s` (at most a quarter of the limit): a burst of samples from one
    quiet moment agrees with itself only. `limit_s` includes the warm-up; without one (None) it is long enough for twice
    `min_samples` rounds, and at least LEAST_LIMIT_S.

    With `level` each sample is divided by the machine's speed at its moment, as its neighbours of all candidates show
    it (see `drift`): medians then stand for one speed, the one that prevailed, and can be compared and added up on a
    machine that changes its clock, and intervals hold at that speed. Without, they are what a user of this machine
    gets.
    """

    warmup_runs: int = 10
    warmup_s: float = 0.2
    rewarm_runs: int = 4
    rewarm_s: float = 5e-3
    precision: float = 0.01
    confidence: float = 0.95
    min_samples: int = 30
    span_s: float = 2.0
    limit_s: float | None = 30.0
    level: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate; `low` … `high` is the interval of the median, `samples` are all, as they came."""

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
    """Timings by candidate; `control` is the candidate `anchor` measured a second time under another name.

    `timed_s` is the time spent inside runs, those of the warm-up included, and `wall_s` that of the measurement.
    """

    timings: dict[str, Timing]
    anchor: str
    control: Timing
    timed_s: float = 0.0
    wall_s: float = 0.0

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
    options, start = options or MeasureOptions(), clock()
    series = {name: _Series(run) for name, run in candidates.items()}
    hints = {name: _warm_up(one.call, options, clock) for name, one in series.items()}
    anchor = anchor if anchor is not None else sorted(hints, key=lambda name: hints[name])[(len(hints) - 1) // 2]
    control = _Series(candidates[anchor])
    if options.limit_s is None:
        every = (hints[anchor], *hints.values())
        round_s = sum(hint + min(options.rewarm_runs * hint, max(options.rewarm_s, hint)) for hint in every)
        limit = clock() - start + max(LEAST_LIMIT_S, 2 * options.min_samples * round_s)
        options = replace(options, limit_s=limit)
    record = _Record([control, *series.values()], options)
    rounds = _rounds(series, record, lambda: clock() - start)
    for _ in track(rounds, "measure", len(series)):
        pass
    timings = {name: one.timing(options) for name, one in series.items()}
    timed = control.spent + sum(one.spent for one in series.values())
    return Measurement(timings, anchor, control.timing(options), timed, clock() - start)


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


def correlation_time(samples: Sequence[float]) -> float:
    """How many samples in a row say what one independent one would, at least 1: for the median of `samples` in order.

    Integrated autocorrelation time of the signs about the median, summed over pairs of lags while they are positive
    (Geyer 1992, initial positive sequence).
    """
    signs = np.sign(np.asarray(samples) - median(samples))
    power = float(signs @ signs)
    if len(signs) < 8 or power == 0:
        return 1.0
    total = -1.0
    for lag in range(0, len(signs) // 2, 2):
        pair = sum(float(signs[: len(signs) - k] @ signs[k:]) / power for k in (lag, lag + 1))
        if pair <= 0:
            break
        total += 2 * pair
    return max(total, 1.0)


def drift(owners: Sequence[int], seconds: Sequence[float], window: int = 31) -> Array:
    """Factor by which the machine was slower than it mostly was, at each of the samples, which are in order of time.

    `owners[i]` is the candidate of sample i. Log times are a candidate's own level plus the machine's, which is the
    median over `window` neighbouring samples of how far they lie off their levels; alternated to convergence, like the
    median polish of a two-way table (Tukey 1977). Candidates run in random order, so no level can follow the drift.
    """
    owner, logs = np.asarray(owners), np.log(np.maximum(seconds, 1e-12))
    members = [np.flatnonzero(owner == one) for one in np.unique(owner)]
    half = min(window, len(logs)) // 2
    slow = np.zeros(len(logs))
    for _ in range(5):
        level = np.empty(len(logs))
        for rows in members:
            level[rows] = np.median(logs[rows] - slow[rows])
        padded = np.pad(logs - level, half, mode="reflect")
        slow = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
        slow -= np.median(slow)
    factor: Array = np.exp(slow)
    return factor


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median of `samples`, which are in order of time; open above where there are too few for one.

    Samples that follow each other are alike where the machine's speed changes: the ranks are those of as many
    independent samples as they are worth.
    """
    ordered = sorted(samples)
    worth = len(ordered) / correlation_time(samples)
    place = int(interval_rank(max(int(worth), 1), confidence) * len(ordered) / max(worth, 1))
    return (ordered[place - 1], ordered[-place]) if place else (0.0, math.inf)


@dataclass
class _Series:
    """The samples of one candidate, in order of time: `levelled` those that count; `spent` seconds in all its runs."""

    run: Candidate
    samples: list[float] = field(default_factory=list)
    levelled: Sequence[float] = ()
    spent: float = 0.0

    def call(self) -> float:
        seconds = self.run()
        self.spent += seconds
        return seconds

    def sample(self, options: MeasureOptions) -> float:
        runs, spent = 0, 0.0
        while runs < options.rewarm_runs and spent < options.rewarm_s:
            spent += self.call()
            runs += 1
        self.samples.append(self.call())
        return self.samples[-1]

    def interval(self, confidence: float) -> tuple[float, float]:
        """Interval of the median in seconds; see `median_interval`."""
        return median_interval(self.levelled, confidence)

    def settled(self, options: MeasureOptions) -> bool:
        if len(self.levelled) < options.min_samples:
            return False
        low, high = self.interval(options.confidence)
        return high - low <= 2 * options.precision * median(self.levelled)

    def timing(self, options: MeasureOptions) -> Timing:
        low, high = self.interval(options.confidence)
        if math.isinf(high):
            low, high = min(self.levelled), max(self.levelled)
        return Timing(median(self.levelled), low, high, self.settled(options), tuple(self.samples))


@dataclass
class _Record:
    """All samples of a measurement in order of time."""

    series: list[_Series]
    options: MeasureOptions
    owners: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def round(self, order: random.Random) -> None:
        """One sample of each, in random order."""
        for owner in order.sample(range(len(self.series)), len(self.series)):
            self.owners.append(owner)
            self.seconds.append(self.series[owner].sample(self.options))

    def level(self) -> None:
        """Bring what each series is judged by up to date."""
        if not self.options.level:
            for one in self.series:
                one.levelled = one.samples
            return
        even = np.asarray(self.seconds) / drift(self.owners, self.seconds)
        for owner, one in enumerate(self.series):
            one.levelled = even[np.asarray(self.owners) == owner].tolist()


def _warm_up(run: Candidate, options: MeasureOptions, clock: Callable[[], float]) -> float:
    """Warm one candidate up; its median over the last runs in seconds."""
    start, seen, window = clock(), list[float](), max(1, options.warmup_runs)
    while len(seen) < window or clock() - start < options.warmup_s:
        seen.append(run())
        if len(seen) >= 2 * window and min(seen[-window:]) > 0.98 * min(seen[:-window]):
            break
    return median(seen[-window:])


def _rounds(series: Mapping[str, _Series], record: _Record, elapsed: Callable[[], float]) -> Iterator[str]:
    """Run rounds until all have settled at one look or time is out; yields each name when it first has.

    Looks come at 5% more rounds each time: fewer looks, fewer lucky stops.
    """
    options = record.options
    order, limit = random.Random(options.seed), options.limit_s or LEAST_LIMIT_S
    least = next(n for n in range(1, 10_000) if interval_rank(n, options.confidence))
    free = elapsed() + min(options.span_s, limit / 4)
    waiting, rounds, look = dict.fromkeys(series), 0, options.min_samples
    while rounds < least or elapsed() < limit:
        record.round(order)
        rounds += 1
        if rounds < look or elapsed() < free:
            continue
        look = math.ceil(1.05 * rounds)
        record.level()
        settled = {name for name, one in series.items() if one.settled(options)}
        for name in [name for name in waiting if name in settled]:
            del waiting[name]
            yield name
        if len(settled) == len(series):
            break
    record.level()
    yield from waiting
