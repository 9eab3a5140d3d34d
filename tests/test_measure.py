"""Measurement: the interval covers, the rules stop, nothing is thrown away."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from derc.errors import DercError
from derc.measure import MeasureOptions, correlation_time, drift, interval_rank, measure, relative


class Clock:
    """Synthetic time: a candidate of it takes what `seconds` says and moves the clock by that."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def candidate(self, name: str, seconds: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            took = seconds()
            self.now += took
            self.log.append(name)
            return took

        return run


def noisy(mean: float, spread: float, seed: int) -> Callable[[], float]:
    """Skewed times, as a real machine's: `mean` and an exponential tail of relative size `spread`."""
    rng = random.Random(seed)
    return lambda: mean * (1 + spread * rng.expovariate(1.0))


def run(clock: Clock, candidates: dict[str, Callable[[], float]], **options):
    calls = {name: clock.candidate(name, seconds) for name, seconds in candidates.items()}
    return measure(calls, MeasureOptions(**options), clock=lambda: clock.now)


def test_interval_ranks_are_the_textbook_ones():
    """Ranks for the 95% interval of a median (Conover 1999, binomial tables)."""
    assert [interval_rank(n) for n in (5, 6, 10, 15, 20, 30, 50, 100)] == [0, 1, 2, 4, 6, 10, 18, 40]


@pytest.mark.parametrize("n", [6, 11, 30, 100, 400])
def test_interval_covers_the_median(n):
    rng = np.random.default_rng(n)
    samples = np.sort(rng.lognormal(size=(4000, n)), axis=1)
    rank = interval_rank(n)
    covered = (samples[:, rank - 1] <= 1) & (samples[:, n - rank] >= 1)
    assert covered.mean() >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 4000)
    if n >= 30:
        assert covered.mean() < 0.98


def test_interval_rank_of_many_samples():
    assert abs(interval_rank(20_000) - (10_000 - 1.96 * math.sqrt(20_000) / 2)) < 2


def test_settles_within_precision():
    result = run(Clock(), {"a": noisy(1e-3, 0.05, 1), "b": noisy(4e-3, 0.05, 2)}, limit_s=60)
    for name, mean in (("a", 1e-3), ("b", 4e-3)):
        timing = result.timings[name]
        assert timing.stable and timing.high - timing.low <= 0.02 * timing.median
        assert timing.median == pytest.approx(mean * (1 + 0.05 * math.log(2)), rel=0.01)


def test_unstable_when_time_is_out():
    clock = Clock()
    result = run(clock, {"wild": noisy(1e-3, 3.0, 1), "calm": lambda: 1e-3}, limit_s=3.0)
    wild = result.timings["wild"]
    assert not wild.stable and wild.low < wild.median < wild.high
    assert wild.high - wild.low > 0.02 * wild.median
    assert result.timings["calm"].stable
    assert 3.0 <= clock.now < 3.1


def test_a_load_that_passes_hits_all_alike():
    """The machine is twice as slow at first: what settles then must not be compared with what settles later."""
    clock = Clock()
    rng = random.Random(0)

    def under_load(mean: float, spread: float) -> Callable[[], float]:
        return lambda: mean * (2 if clock.now < 3 else 1) * (1 + spread * rng.expovariate(1.0))

    result = run(clock, {"calm": under_load(1e-3, 0.0), "wild": under_load(1e-3, 2.0)}, limit_s=30)
    calm, wild = result.timings["calm"], result.timings["wild"]
    assert len(calm.samples) == len(wild.samples) == len(result.control.samples)
    assert wild.median / calm.median == pytest.approx(1 + 2 * math.log(2), rel=0.1)


def test_nothing_settles_in_one_quiet_moment():
    clock = Clock()
    result = run(clock, {"a": lambda: 1e-4}, limit_s=20, span_s=2.0, warmup_s=0.0)
    assert clock.now >= 2.0 and result.timings["a"].stable


def test_warm_up_has_enough_runs_and_is_not_counted():
    clock = Clock()
    cold = itertools.chain([1.0] * 9, itertools.repeat(1e-3))
    result = run(clock, {"a": lambda: next(cold)}, limit_s=20)
    assert max(result.timings["a"].samples) == 1e-3


def test_samples_follow_runs_that_rewarm():
    """Each candidate is slow for three runs after another one ran: no sample shows it."""
    clock, state = Clock(), {"last": "", "run": 0}

    def cold(name: str) -> Callable[[], float]:
        def seconds() -> float:
            state.update(last=name, run=state["run"] + 1 if state["last"] == name else 1)
            return 1e-3 if state["run"] > 3 else 1.5e-3

        return seconds

    result = run(clock, {name: cold(name) for name in "ab"}, limit_s=5)
    assert {seconds for timing in result.timings.values() for seconds in timing.samples} == {1e-3}
    slow = run(Clock(), {"slow": lambda: 0.1}, limit_s=10, warmup_s=0.0)
    assert len(slow.timings["slow"].samples) >= 20


def test_warm_up_goes_on_while_runs_get_faster():
    clock = Clock()
    times = (max(1e-3, 3e-3 * 0.97**turn) for turn in itertools.count())
    result = run(clock, {"a": lambda: next(times)}, limit_s=20)
    assert max(result.timings["a"].samples) == pytest.approx(1e-3)


def test_rounds_are_interleaved_at_random_and_seeded():
    def order(seed: int) -> list[str]:
        clock = Clock()
        run(clock, dict.fromkeys("abc", lambda: 1e-3), limit_s=2, rewarm_runs=0, seed=seed)
        return clock.log

    first = order(0)
    assert first == order(0) and first != order(1)
    rounds = [tuple(first[i : i + 4]) for i in range(60, 160, 4)]
    assert all(set(turn) == set("abc") for turn in rounds) and len(set(rounds)) > 5


def test_outliers_stay_and_the_median_resists_them():
    rng = random.Random(3)
    result = run(Clock(), {"a": lambda: 1.0 if rng.random() < 0.1 else 1e-3}, limit_s=60)
    timing = result.timings["a"]
    assert max(timing.samples) == 1.0 and timing.median == 1e-3


def test_percentiles_only_where_the_count_allows():
    few = run(Clock(), {"a": lambda: 1e-3}, limit_s=0.2, warmup_s=0.0, span_s=0.0, min_samples=30)
    assert set(few.timings["a"].percentiles) == {50}
    many = run(Clock(), {"a": noisy(1e-3, 3.0, 1)}, limit_s=30)
    percentiles = many.timings["a"].percentiles
    assert set(percentiles) == {50, 90, 99}
    assert percentiles[50] < percentiles[90] < percentiles[99]


def test_control_agrees_with_its_anchor():
    result = run(Clock(), {name: noisy(1e-3 * i, 0.1, i) for i, name in enumerate("abc", 1)}, limit_s=60)
    assert result.anchor == "b"
    assert result.noise == relative(result.timings["b"].median, result.control.median) < 0.02


def test_relative():
    assert relative(1.0, 1.0) == 0 and relative(0.0, 0.0) == 0
    assert relative(0.9, 1.1) == pytest.approx(0.2)


def test_latency_is_in_milliseconds():
    latency = run(Clock(), {"a": lambda: 2e-3}, limit_s=10).timings["a"].latency()
    assert latency.ms == pytest.approx(2.0) and latency.low_ms <= latency.ms <= latency.high_ms
    assert latency.provenance == "measured" and latency.stable and latency.samples >= 30


def test_a_limit_too_short_still_gives_an_interval():
    result = run(Clock(), {"slow": noisy(1.0, 0.5, 1)}, limit_s=0.1)
    timing = result.timings["slow"]
    assert len(timing.samples) == 6 and not timing.stable and timing.low < timing.median < timing.high


def test_progress_names_every_candidate_once():
    seen: list[str] = []

    def track(items, label, total):
        assert (label, total) == ("measure", 2)
        for item in items:
            seen.append(item)
            yield item

    clock = Clock()
    calls = {name: clock.candidate(name, noisy(1e-3, spread, 1)) for name, spread in (("a", 0.01), ("b", 5.0))}
    measure(calls, MeasureOptions(limit_s=2), track=track, clock=lambda: clock.now)
    assert sorted(seen) == ["a", "b"]


def test_nothing_to_measure():
    with pytest.raises(DercError, match="nothing to measure"):
        measure({})


def autoregressive(rho: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A stationary Gaussian series whose neighbours correlate by `rho`."""
    noise, x = rng.standard_normal(count + 200), np.zeros(count + 200)
    for i in range(1, len(x)):
        x[i] = rho * x[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return x[200:]


def test_correlation_time_of_signs_is_the_theoretical_one():
    """Signs of a Gaussian series of correlation r correlate by 2/π·asin(r) (the arcsine law)."""
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.5, 0.9):
        theory = 1 + 2 * sum(2 / math.pi * math.asin(rho**lag) for lag in range(1, 400))
        found = np.mean([correlation_time(autoregressive(rho, 2000, rng).tolist()) for _ in range(40)])
        assert found == pytest.approx(theory, rel=0.15)
    assert correlation_time([1.0] * 100) == 1.0 == correlation_time([1.0, 2.0])


def test_intervals_cover_the_median_of_a_machine_that_drifts():
    """Without regard to correlation the 95% interval covers the true median only about half of the time."""
    rng, covered, plain = np.random.default_rng(1), 0, 0
    for _ in range(150):
        samples = (1 + 0.01 * autoregressive(0.8, 200, rng)).tolist()
        feed = iter(samples[:1] + samples)
        options = {"warmup_runs": 1, "warmup_s": 0.0, "rewarm_runs": 0, "span_s": 0.0, "precision": 0.0}
        timing = measure({"a": lambda feed=feed: next(feed, 1.0)}, MeasureOptions(limit_s=1e-9, **options)).timings["a"]
        assert timing.low <= timing.median <= timing.high
        ordered, rank = sorted(samples), interval_rank(200)
        wide = int(interval_rank(int(200 / correlation_time(samples))) * correlation_time(samples))
        covered += ordered[wide - 1] <= 1 <= ordered[-wide]
        plain += ordered[rank - 1] <= 1 <= ordered[-rank]
    assert covered / 150 >= 0.88 and plain / 150 < 0.7


def test_drift_is_what_the_machine_did():
    """Forty candidates on a machine that is 1.4 times slower every other while: levels and drift are found."""
    rng = np.random.default_rng(2)
    levels = np.exp(rng.normal(0, 1, 40))
    owners = np.concatenate([rng.permutation(40) for _ in range(60)])
    slow = np.where((np.arange(len(owners)) // 400) % 2 == 1, 1.4, 1.0)
    seconds = levels[owners] * slow * (1 + 0.02 * rng.exponential(size=len(owners)))
    found = drift(owners.tolist(), seconds.tolist())
    assert np.median(np.abs(found / slow / np.median(found / slow) - 1)) < 0.005
    even = seconds / found
    shares = [np.array([np.median(x[owners == i]) / levels[i] for i in range(40)]) for x in (even, seconds)]
    off, raw = (np.abs(share / np.median(share) - 1).max() for share in shares)
    assert off < 0.01 < 0.03 < raw


def test_levelled_medians_agree_on_a_machine_that_changes_its_clock():
    clock = Clock()
    rng = random.Random(0)

    def two_speeds(mean: float) -> Callable[[], float]:
        return lambda: mean * (0.7 if int(clock.now / 1.5) % 2 else 1.0) * (1 + 0.02 * rng.expovariate(1.0))

    means = {f"{i}": 1e-3 * (1 + i) for i in range(12)}
    result = run(clock, {name: two_speeds(mean) for name, mean in means.items()}, limit_s=20, level=True)
    ratios = [result.timings[name].median / mean for name, mean in means.items()]
    assert max(ratios) / min(ratios) < 1.02
    assert all(timing.stable for timing in result.timings.values())
    assert min(result.timings["3"].samples) < 0.75 * max(result.timings["3"].samples)


def test_time_inside_runs_is_counted():
    clock = Clock()
    result = run(clock, {"a": lambda: 2e-3, "b": lambda: 1e-3}, limit_s=2)
    assert result.timed_s == pytest.approx(clock.now) == pytest.approx(result.wall_s)


def test_without_a_limit_the_rounds_set_it():
    clock = Clock()
    result = run(clock, {"wild": noisy(1.0, 0.3, 1), "slow": noisy(2.0, 0.3, 2)}, limit_s=None, warmup_s=0.0)
    assert 50 <= len(result.timings["wild"].samples) <= 70
