"""Latencies without a measurement: a roofline with overhead, in a device's public figures, calibrated by tables.

    ms = (a + b·kernels)·overhead + c·macs/peak + d·depthwise/peak + e·bytes/bandwidth

The factors say by how much a device misses its figures (Williams et al. 2009, with overheads of a call and of a kernel,
and as a sum in place of the maximum, which latencies of small kernels are nearer to).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import psutil

from derc.artifacts import Array, Latency
from derc.engine import parse
from derc.errors import DercError
from derc.target import Device, Target
from derc.workload import FLOAT_BYTES, Work

DEFAULT = (4.0, 1.0, 2.0, 8.0, 1.5)
"""Factors where nothing was measured: half the peak in dense products, an eighth of it in depthwise ones."""
UNCALIBRATED = 4.0
"""Where nothing was measured, the latency lies within this factor, up or down."""
FEW = 2.0
"""The same at least where fewer than three networks were measured, or those on another device alone."""
LEAST_SHARE = 0.1
"""No factor falls below this share of its scaled default: a fit may call a resource free, no device does."""
ENOUGH = 8
"""Fewer entries than this scale all factors alike."""
ROUNDS = 30
SMOOTH = 0.05
"""Residuals below this (as logarithms) count as squares, larger ones as absolute values."""
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Sample:
    """One measured latency in ms of a part of `network` on a device, with what the part asks of it."""

    network: str
    work: Work
    ms: float
    device: Device
    target: str
    engine: str
    threads: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Calibration:
    """Factors in the order of `features`; `low` … `high` hold 95% of known ratios of measured to predicted.

    `basis` says in words what they come from.
    """

    factors: tuple[float, ...] = DEFAULT
    low: float = 1 / UNCALIBRATED
    high: float = UNCALIBRATED
    entries: int = 0
    basis: str = "no measurement: the device's public figures and assumed efficiencies"

    def predict(self, work: Work, device: Device, *, threads: int = 1, precision: str = "fp32") -> Latency:
        """The predicted latency with an interval that 95% of the known errors lie in."""
        ms = float(features(work, device, threads, precision) @ np.array(self.factors))
        return Latency(ms, ms * self.low, ms * self.high, provenance="predicted")


def features(work: Work, device: Device, threads: int = 1, precision: str = "fp32") -> Array:
    """Milliseconds of the call, kernels, dense and depthwise products and memory, each at the device's own figures.

    A precision that has no peak of its own runs at that of fp32.
    """
    if precision not in BYTES:
        raise DercError(f"{precision!r} is no precision, known: {', '.join(BYTES)}")
    peak = device.peaks.get(precision, device.peaks["fp32"]) * (threads if device.per_thread else 1)
    moved = work.bytes * BYTES[precision] / FLOAT_BYTES
    return np.array(
        [
            device.overhead / 1e3,
            work.kernels * device.overhead / 1e3,
            2 * work.macs / peak / 1e9,
            2 * work.depthwise / peak / 1e9,
            moved / device.bandwidth / 1e6,
        ]
    )


def computed(spec: str, precision: str) -> str:
    """What a block of `precision` is computed in by an engine: fp32 stands for the engine's own, its variant's."""
    _, variant = parse(spec)
    return variant if precision == "fp32" and variant in BYTES else precision


def device_threads(target: Target) -> int:
    """Threads that the target's engine runs with on this machine."""
    return target.threads or psutil.cpu_count(logical=False) or 1


def calibrate(target: Target, samples: Sequence[Sample]) -> Calibration:
    """Factors for `target` by samples of it with its engine, else of it, else of devices of its kind, else defaults."""
    kind = target.known.kind
    own = [one for one in samples if one.target == target.name]
    for found, basis in (
        ([one for one in own if one.engine == target.engine], f"{target.name} with {target.engine}"),
        (own, f"{target.name} with another engine than {target.engine}"),
        ([one for one in samples if one.device.kind == kind], f"other devices of kind {kind}"),
    ):
        if found:
            close = found[0].target == target.name and found[0].engine == target.engine
            return fit(found, f"{len(found)} latencies measured on {basis}", widen=not close)
    return Calibration()


def fit(samples: Sequence[Sample], basis: str = "", *, widen: bool = False) -> Calibration:
    """Factors with the least summed |log(predicted / measured)|, none below `LEAST_SHARE` of its default.

    The interval comes from networks that the fit has not seen, one left out at a time; with fewer than three networks,
    or where `widen`, it is at least a factor of `FEW`.
    """
    rows = np.array([features(one.work, one.device, one.threads, one.precision) for one in samples])
    ms = np.array([one.ms for one in samples])
    names = np.array([one.network for one in samples])
    known = (rows.sum(1) > 0) & (ms > 0)
    rows, ms, names = rows[known], ms[known], names[known]
    if not len(ms):
        return Calibration()
    ratios = ms / (rows @ factors(rows, ms))
    networks = list(dict.fromkeys(names))
    if len(networks) >= 3:
        for name in networks:
            out = names == name
            ratios[out] = ms[out] / (rows[out] @ factors(rows[~out], ms[~out]))
    low, high = (float(value) for value in np.quantile(ratios, [0.025, 0.975]))
    least = FEW if widen or len(networks) < 3 else 1.0
    return Calibration(tuple(map(float, factors(rows, ms))), min(low, 1 / least), max(high, least), len(ms), basis)


def factors(rows: Array, ms: Array) -> Array:
    """The factors f of `fit` for feature rows (n, 5); what no row asks for keeps its scaled default."""
    default = np.array(DEFAULT)
    scale = float(np.exp(np.median(np.log(ms / (rows @ default)))))
    found = default * scale
    asked = np.flatnonzero(rows.sum(0) > 0)
    if len(ms) < ENOUGH:
        return found
    idle = np.setdiff1d(np.arange(len(default)), asked)
    for _ in range(ROUNDS):
        before = found
        predicted = rows @ found
        weights = 1 / np.sqrt(ms * predicted) / np.sqrt(np.maximum(np.abs(np.log(predicted / ms)), SMOOTH))
        least = LEAST_SHARE * scale * default
        rest = weights * (ms - rows @ least)
        found = least.copy()
        found[asked] += nonnegative(weights[:, None] * rows[:, asked], rest)
        found[idle] = default[idle] * scale
        if np.allclose(found, before, rtol=1e-9, atol=0):
            break
    return found


def nonnegative(rows: Array, values: Array) -> Array:
    """Weights w ≥ 0 minimising Σ (row·w − value)²; exact, by trying every set of non-zero weights."""
    best, least = np.zeros(rows.shape[1]), float(np.sum(values**2))
    for size in range(1, rows.shape[1] + 1):
        for columns in map(list, combinations(range(rows.shape[1]), size)):
            found = np.linalg.lstsq(rows[:, columns], values, rcond=None)[0]
            error = float(np.sum((rows[:, columns] @ found - values) ** 2))
            if (found >= 0).all() and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[columns] = found
    return best


def predictions(
    calibration: Calibration, target: Target, works: Mapping[str, Work], precisions: Mapping[str, str] | None = None
) -> dict[str, Latency]:
    """Predicted latencies by name; `precisions` by name, fp32 where not given."""
    device, threads, given = target.known, device_threads(target), precisions or {}
    return {
        name: calibration.predict(work, device, threads=threads, precision=given.get(name, "fp32"))
        for name, work in works.items()
    }
