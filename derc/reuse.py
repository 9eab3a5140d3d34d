"""Latencies measured before on this very device: kept by what was measured, and brought to one scale with new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from derc.artifacts import Array, Latency, digest
from derc.measure import MeasureOptions, Timing, measure
from derc.pipeline import Context, code_version

LINKS = 9
"""Known parts that are measured again beside the new ones."""
KEPT = 0.05
"""Half-width of the interval, as a share, up to which a latency is kept."""
APART = 0.05
"""How far a link's slowdown may lie off the median of all, beyond what both intervals allow, before it disagrees."""


@dataclass(frozen=True)
class Timed:
    """One part's latency and its raw `samples` in seconds, in order of time."""

    latency: Latency
    samples: Array


def key_of(context: Context, model: bytes, options: MeasureOptions) -> str:
    """Where the latency of an ONNX model is kept: all its bytes, weights too, the runtime and the device decide."""
    how = replace(options, limit_s=None, seed=0)
    return digest(model, context.engine.describe(), how, code_version(measure.__module__))


def worth_keeping(timed: Timed) -> bool:
    """Whether a latency is known well enough to be used again: enough samples, and an interval within KEPT."""
    latency = timed.latency
    enough = latency.samples >= MeasureOptions.min_samples
    return enough and latency.high_ms - latency.low_ms <= 2 * KEPT * latency.ms


def links(known: Mapping[str, Timed], count: int = LINKS) -> tuple[str, ...]:
    """Up to `count` names of known parts, evenly spread over their latencies from the slowest down."""
    order = sorted(known, key=lambda name: (-known[name].latency.ms, name))
    if len(order) <= count:
        return tuple(order)
    return tuple(order[round(i * (len(order) - 1) / (count - 1))] for i in range(count))


def slowdown(known: Mapping[str, Timed], timings: Mapping[str, Timing]) -> float | None:
    """How many times slower the machine now is than when the links were measured: the median of theirs.

    None where more than a third of them disagree with it: then the machine is another than before, and nothing old
    counts.
    """
    shared = sorted(known.keys() & timings.keys())
    if not shared:
        return 1.0
    factor = median(timings[name].median * 1e3 / known[name].latency.ms for name in shared)
    apart = sum(_disagrees(known[name].latency, timings[name].latency(), factor) for name in shared)
    return factor if 3 * apart <= len(shared) else None


def _disagrees(then: Latency, now: Latency, factor: float) -> bool:
    low, high = then.low_ms * factor, then.high_ms * factor
    return now.low_ms > high * (1 + APART) or now.high_ms * (1 + APART) < low


def scaled(names: Iterable[str], timings: Mapping[str, Timing], factor: float) -> dict[str, Timed]:
    """The timings of `names`, as they would have been when the machine was `factor` times faster."""
    found = {}
    for name in names:
        now = timings[name].latency()
        latency = replace(now, ms=now.ms / factor, low_ms=now.low_ms / factor, high_ms=now.high_ms / factor)
        found[name] = Timed(latency, np.array(timings[name].samples))
    return found
