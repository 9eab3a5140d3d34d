"""Measure donors, blocks, stitches and whole assemblies on the target, and fit what a sum of parts misses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from derc import deployed, exporting, layered
from derc.artifacts import (
    Array,
    Assembly,
    BlockRef,
    CutZoo,
    Evaluated,
    Latency,
    LatencyTable,
    Partition,
    digest,
)
from derc.engine import Session
from derc.errors import DercError, MissingDependencyError, UnstableError, UsageError
from derc.measure import Measurement, MeasureOptions, measure
from derc.pipeline import Context
from derc.prediction import predict, wholes
from derc.reuse import Timed, scaled, slowdown, worth_keeping
from derc.sampling import sample, stitches
from derc.sessions import Part, open_parts
from derc.slices import Slices
from derc.stitch_latency import predict as predict_stitches
from derc.stitch_latency import spread, stitch_shapes

CALIBRATION_IMAGES = 64
"""Probe images that show a block what flows into it."""
NOISY = 0.25
"""Half-width of the anchor's interval, as a share, from which on a table would be worth nothing."""

Variants = dict[BlockRef, list[Array]]
"""Blocks in lower precisions, with what flows into each."""


@dataclass(frozen=True)
class _Found:
    """What is known of every part, with the measurement behind it."""

    timed: dict[str, Timed]
    measurement: Measurement
    distortion: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """Measures at least `max_stitches` shapes of stitches, where there are so many, and up to `networks` assemblies.

    `limit_s` bounds the measurement of everything together; None: as long as twice the least number of rounds takes.
    """

    name: ClassVar[str] = "profile"
    produces: ClassVar[type] = LatencyTable

    max_stitches: int = 24
    networks: int = 24
    limit_s: float | None = None
    precision: float = 0.01

    def __post_init__(self) -> None:
        if self.max_stitches < 4:
            raise UsageError(
                f"max_stitches is {self.max_stitches}: a fit for the stitches needs at least 4 measured ones"
            )

    def inputs(self, context: Context) -> str:
        """Donors, device, engine, precisions, shapes and exporter."""
        donors = {name: context.zoo[name].digest() for name in context.zoo.names}
        lower = context.data.probe.digest if len(context.precisions) > 1 else ""
        device = context.engine.describe(), context.target, list(context.precisions), lower
        return digest(donors, *device, exporting.versions(), context.seed)

    def run(self, context: Context, cut_zoo: CutZoo, partition: Partition) -> LatencyTable:
        """Latencies by donor name, `str(BlockRef)` and `stitching.key`; see LatencyTable.

        Raises UnstableError where the machine is too noisy for any latency to be known, BuildError where nothing can be
        built, UsageError where no donor can be exported.
        """
        partition, failed = deployed.exportable(context, partition)
        shapes, graph = stitch_shapes(cut_zoo, partition), layered.build(cut_zoo, partition)
        likely = frozenset(spread(shapes, self.max_stitches))
        networks = sample(graph, self.networks, context.seed, likely)
        chosen = {key: shapes[key] for key in sorted(likely.union(*(stitches(graph, a) for a in networks)))}
        slices = Slices(context, cut_zoo, chosen)
        variants = _rewrite(context, partition, slices, failed)
        parts = _models(slices, partition, variants, networks)
        found = self._timed(context, parts, variants, failed, f"donor {_median_donor(cut_zoo)}")
        known = {name: timed.latency for name, timed in found.timed.items()}
        table = LatencyTable(
            target=context.target.name,
            engine=context.engine.describe(),
            donors=_of("donor", known),
            blocks=_of("block", known),
            stitches=predict_stitches(shapes, _of("stitch", known)),
            noise=found.measurement.noise,
            distortion=found.distortion,
            weights={name: deployed.weight_bytes(model) for name, model in slices.rewritten.items()},
            failed=failed,
            networks=tuple(Evaluated(a, None, known[f"network {a}"]) for a in networks if f"network {a}" in known),
            samples={name: timed.samples for name, timed in found.timed.items()},
            timed_s=found.measurement.timed_s,
            measured_s=found.measurement.wall_s,
        )
        return replace(table, errors=_errors(table, cut_zoo, partition))

    def _timed(
        self, context: Context, parts: Mapping[str, Part], variants: Variants, failed: dict[str, str], anchor: str
    ) -> _Found:
        """Latencies of all parts: those known of this device, where it still is as it was, and new ones."""
        with ExitStack() as stack:
            compared = {f"block {block}" for variant in variants for block in (variant, variant.plain)}
            opened = open_parts(context, stack, parts, failed, self.options(context.seed), compared)
            distortion = _distortions(variants, opened.sessions)
            measured = self._measure(context, opened.sessions, anchor)
            fresh = [name for name in opened.sessions if name not in opened.known]
            factor = slowdown(opened.known, measured.timings)
            if factor is None:
                context.console.say(
                    "profile: the machine is not as it was when parts were measured: measuring all anew"
                )
                sessions = open_parts(context, stack, parts, failed, None).sessions
                measured, fresh, factor = self._measure(context, sessions, anchor), list(sessions), 1.0
            timed = scaled(fresh, measured.timings, factor)
        for name in [name for name, one in timed.items() if worth_keeping(one) and opened.keys[name]]:
            context.store.put(opened.keys[name], timed[name], note=f"latency of {name}")
        return _Found(
            {name: (opened.known | timed)[name] for name in parts if name in opened.known | timed}, measured, distortion
        )

    def options(self, seed: int) -> MeasureOptions:
        """How everything is measured."""
        return MeasureOptions(limit_s=self.limit_s, precision=self.precision, level=True, seed=seed)

    def _measure(self, context: Context, sessions: Mapping[str, Session], anchor: str) -> Measurement:
        """Raises UnstableError where not even the anchor's latency is known to 25%."""
        calls = {name: session.time for name, session in sessions.items()}
        anchor = anchor if anchor in calls else next(iter(calls))
        measured = measure(calls, self.options(context.seed), anchor=anchor, track=context.console.track)
        unstable = sum(not timing.stable for timing in measured.timings.values())
        if unstable:
            context.console.say(
                f"profile: {unstable} of {len(calls)} latencies did not settle to {self.precision:.0%} "
                f"in {measured.wall_s:.0f} s and keep wider intervals (A/A difference {measured.noise:.1%})"
            )
        found = measured.timings[anchor].latency()
        enough = found.samples >= MeasureOptions.min_samples
        if enough and found.high_ms - found.low_ms > 2 * NOISY * found.ms:
            raise UnstableError(
                f"the machine is too noisy to measure on: {anchor} takes between {found.low_ms:.3f} and "
                f"{found.high_ms:.3f} ms after {found.samples} samples; stop other work on it, or give more time with "
                "--profile-s"
            )
        return measured


def _rewrite(context: Context, partition: Partition, slices: Slices, failed: dict[str, str]) -> Variants:
    """Add every block in every lower precision to `slices`; why one cannot be had goes to `failed`."""
    variants: Variants = {}
    for block, samples in _flows(context, partition):
        try:
            slices.rewrite(block, samples)
            variants[block] = samples
        except MissingDependencyError:
            raise
        except DercError as error:
            failed[str(block)] = str(error)
    return variants


def _models(
    slices: Slices, partition: Partition, variants: Variants, networks: tuple[Assembly, ...]
) -> dict[str, Part]:
    """What is measured, by kind and name, each made when it is called for."""
    blocks = [block for chain in partition.blocks.values() for block in chain]
    return {
        **{f"donor {name}": partial(slices.donor, name) for name in partition.blocks},
        **{f"block {block}": partial(slices.block, block) for block in (*blocks, *variants)},
        **{f"stitch {key}": partial(slices.stitch, key) for key in slices.shapes},
        **{f"network {network}": partial(slices.assembly, network) for network in networks},
    }


def _of(kind: str, known: Mapping[str, Latency]) -> dict[str, Latency]:
    return {name.removeprefix(f"{kind} "): ms for name, ms in known.items() if name.startswith(f"{kind} ")}


@torch.no_grad()
def _flows(context: Context, partition: Partition) -> Iterator[tuple[BlockRef, list[Array]]]:
    """Every block in every lower precision, with what flows into it in its own donor from the probe set."""
    lower = [precision for precision in context.precisions if precision != "fp32"]
    if not lower:
        return
    images = next(iter(context.data.probe.batches(CALIBRATION_IMAGES)))[0]
    for name, chain in partition.blocks.items():
        x, at = images, 0
        for block in chain:
            x, at = context.lowered[name].block(at, block.first)(x.clone()) if block.first > at else x, block.first
            samples = deployed.batches(x.numpy(), context.target.batch)
            for precision in lower:
                yield replace(block, precision=precision), samples


def _distortions(variants: Variants, sessions: Mapping[str, Session]) -> dict[str, float]:
    """Share of the variance of each block's output by which its lower precision differs."""
    found = {}
    for block, samples in variants.items():
        plain, lower = sessions.get(f"block {block.plain}"), sessions.get(f"block {block}")
        if plain and lower:
            want, given = (np.concatenate([s.run(x) for x in samples]).astype(np.float64) for s in (plain, lower))
            found[str(block)] = float(np.square(given - want).mean() / max(want.var(), 1e-30))
    return found


def _errors(table: LatencyTable, cuts: CutZoo, partition: Partition) -> dict[str, float]:
    """Errors of the prediction of each network measured whole, by the others."""
    graph = layered.build(cuts, partition, timed=table.blocks)
    known = {assembly: latency.ms for assembly, latency in wholes(table, graph).items()}
    return {str(assembly): error for assembly, error in predict(graph, cuts, table, known).errors.items()}


def _median_donor(cut_zoo: CutZoo) -> str:
    macs = {name: sum(unit.macs for unit in donor.units) for name, donor in cut_zoo.donors.items()}
    return sorted(macs, key=lambda name: (macs[name], name))[(len(macs) - 1) // 2]


def intact_model(context: Context, name: str) -> bytes:
    """The whole donor as ONNX, just as its latency was measured for the table."""
    model, last = deployed.donor_model(context, name), len(context.lowered[name].units)
    return exporting.slice_model(model, ("cut_0",), (f"cut_{last}",))
