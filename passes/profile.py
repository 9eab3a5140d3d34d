"""Measure every block, every intact donor and a spread of stitches on the target; predict the other stitches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch

from derc import exporting, stitching
from derc.artifacts import Array, BlockRef, CutZoo, Latency, LatencyTable, Partition, digest
from derc.engine import Session
from derc.errors import UsageError
from derc.ir import TensorType
from derc.lowered import Lowered
from derc.measure import Measurement, MeasureOptions, measure
from derc.pipeline import Context, code_version

Shapes = dict[str, tuple[TensorType, TensorType]]


@dataclass(frozen=True)
class Profile:
    """At most `max_stitches` stitches are measured; `limit_s` bounds the measurement of everything together."""

    name: ClassVar[str] = "profile"
    produces: ClassVar[type] = LatencyTable

    max_stitches: int = 24
    limit_s: float = 40.0
    precision: float = 0.01

    def __post_init__(self) -> None:
        if self.max_stitches < 4:
            raise UsageError(
                f"max_stitches is {self.max_stitches}: a fit for the stitches needs at least 4 measured ones"
            )

    def inputs(self, context: Context) -> str:
        """Donors, device, engine, shapes and exporter."""
        donors = {name: context.zoo[name].digest() for name in context.zoo.names}
        return digest(donors, context.engine.describe(), context.target, exporting.versions(), context.seed)

    def run(self, context: Context, cut_zoo: CutZoo, partition: Partition) -> LatencyTable:
        """Latencies by donor name, `str(BlockRef)` and `stitching.key`."""
        whole = {name: str(BlockRef(name, 0, len(cut_zoo.donors[name].units), 0)) for name in partition.blocks}
        shapes = stitch_shapes(cut_zoo, partition)
        chosen = spread(shapes, self.max_stitches)
        with ExitStack() as stack:
            sessions: dict[str, Session] = {}
            for name, blocks in context.console.track(partition.blocks.items(), "export", len(whole)):
                spans = {(0, len(cut_zoo.donors[name].units))} | {(block.first, block.last) for block in blocks}
                sessions |= _open_blocks(context, stack, name, spans)
            sessions |= _open_stitches(context, stack, {key: shapes[key] for key in chosen})
            measured = self._measure(context, sessions, whole[_median_donor(cut_zoo)])
        known = {name: timing.latency() for name, timing in measured.timings.items()}
        return LatencyTable(
            target=context.target.name,
            engine=context.engine.describe(),
            donors={name: known[span] for name, span in whole.items()},
            blocks={str(block): known[str(block)] for blocks in partition.blocks.values() for block in blocks},
            stitches=predict(shapes, {key: known[key] for key in chosen}),
            noise=measured.noise,
        )

    def _measure(self, context: Context, sessions: Mapping[str, Session], anchor: str) -> Measurement:
        options = MeasureOptions(limit_s=self.limit_s, precision=self.precision, seed=context.seed)
        calls = {name: session.time for name, session in sessions.items()}
        measured = measure(calls, options, anchor=anchor, track=context.console.track)
        unstable = sum(not timing.stable for timing in measured.timings.values())
        if unstable:
            context.console.say(
                f"profile: {unstable} of {len(calls)} latencies did not settle to {self.precision:.0%} "
                f"in {self.limit_s:g} s and keep wider intervals (A/A difference {measured.noise:.1%})"
            )
        return measured


def stitch_shapes(cut_zoo: CutZoo, partition: Partition) -> Shapes:
    """The distinct (source, target) types of all stitches that an assembly may need, by `stitching.key`.

    A stitch leads from the end of a block to the start of any block of a later set, unless one donor just goes on.
    """
    blocks = [block for chain in partition.blocks.values() for block in chain]
    shapes: Shapes = {}
    for before in blocks:
        source = cut_zoo.donors[before.donor].cuts[before.last].type
        for after in blocks:
            target = cut_zoo.donors[after.donor].cuts[after.first].type
            goes_on = before.donor == after.donor and before.last >= after.first
            if after.set > before.set and not goes_on and stitching.keeps_places(source, target):
                shapes[stitching.key(source, target)] = (source, target)
    return shapes


def spread(shapes: Shapes, count: int) -> list[str]:
    """`count` keys that lie far apart in log MACs and log bytes, by farthest-point sampling from the cheapest."""
    keys = sorted(shapes)
    if len(keys) <= count:
        return keys
    points = np.log1p(np.array([_features(*shapes[key])[1:] for key in keys]))
    points = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    taken = [int(points.sum(1).argmin())]
    distance = np.full(len(keys), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
        distance[taken] = -1.0
        taken.append(int(distance.argmax()))
    return [keys[place] for place in taken]


def predict(shapes: Shapes, measured: Mapping[str, Latency]) -> dict[str, Latency]:
    """Latency of every stitch: `measured` where there is one, else a + b·MACs + c·bytes with a, b, c ≥ 0.

    The interval holds 95% of the leave-one-out errors, as ratios.
    """
    if len(measured) == len(shapes):
        return dict(measured)
    rows = np.array([_features(*shapes[key]) for key in measured])
    times = np.array([latency.ms for latency in measured.values()])
    weights = fit(rows, times)
    others = [np.delete(np.arange(len(times)), i) for i in range(len(times))]
    ratios = [times[i] / (rows[i] @ fit(rows[rest], times[rest])) for i, rest in enumerate(others)]
    low, high = np.quantile(ratios, [0.025, 0.975])
    table = dict(measured)
    for key in shapes.keys() - measured.keys():
        ms = float(_features(*shapes[key]) @ weights)
        table[key] = Latency(ms, ms * min(1.0, float(low)), ms * max(1.0, float(high)), provenance="predicted")
    return {key: table[key] for key in sorted(table)}


def fit(rows: Array, times: Array) -> Array:
    """Non-negative weights w minimising Σ (row·w − time)²; exact, by trying every set of non-zero weights.

    Milliseconds, not ratios: that is what a budget adds up, and ratios would pull the fit to the cheapest stitches.
    """
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for columns in map(list, combinations(range(rows.shape[1]), size)):
            found = np.linalg.lstsq(rows[:, columns], times, rcond=None)[0]
            error = float(np.sum((rows[:, columns] @ found - times) ** 2))
            if (found >= 0).all() and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[columns] = found
    return best


def _features(source: TensorType, target: TensorType) -> Array:
    """(1, mega-MACs, megabytes in and out) of one stitch, for one image."""
    macs = stitching.cost(source, target).macs
    return np.array([1.0, macs / 1e6, 4 * (source.numel + target.numel) / 1e6])


def _median_donor(cut_zoo: CutZoo) -> str:
    macs = {name: sum(unit.macs for unit in donor.units) for name, donor in cut_zoo.donors.items()}
    return sorted(macs, key=lambda name: (macs[name], name))[(len(macs) - 1) // 2]


def _example(kind: TensorType, batch: int) -> torch.Tensor:
    return torch.randn(batch, *kind.shape, generator=torch.Generator().manual_seed(0))


def _open_blocks(context: Context, stack: ExitStack, name: str, spans: set[tuple[int, int]]) -> dict[str, Session]:
    """Sessions of a donor's blocks, all sliced out of one export."""
    slicer = exporting.Slicer(export_donor(context, name, context.lowered[name]))
    sessions = {}
    for first, last in sorted(spans):
        session = context.engine.open(slicer.slice((f"cut_{first}",), (f"cut_{last}",)))
        stack.callback(session.close)
        sessions[str(BlockRef(name, first, last, 0))] = session
    return sessions


def intact_model(context: Context, name: str) -> bytes:
    """The whole donor as ONNX, just as its latency was measured for the table."""
    lowered = context.lowered[name]
    model = export_donor(context, name, lowered)
    return exporting.slice_model(model, ("cut_0",), (f"cut_{len(lowered.units)}",))


def export_donor(context: Context, name: str, lowered: Lowered) -> bytes:
    """The donor's export with every cut as a named output, from the store where it is there."""
    batch, cuts, code = context.target.batch, lowered.cuts, code_version(exporting.__name__)
    key = digest(["donor", context.zoo[name].digest(), batch, code], exporting.versions(), *cuts)
    model = context.store.get_bytes(key)
    if model is None:
        chain = exporting.Chain(lowered.block(i, i + 1) for i in range(len(cuts) - 1))
        outputs = [f"cut_{i}" for i in range(1, len(cuts))]
        model = exporting.export(chain, _example(cuts[0].type, batch), outputs, input_names=["cut_0"])
        context.store.put_bytes(key, model, note=f"onnx {name}")
    return model


def _open_stitches(context: Context, stack: ExitStack, shapes: Shapes) -> dict[str, Session]:
    """Sessions of the stitches, all sliced out of one export."""
    if not shapes:
        return {}
    batch, code = context.target.batch, code_version(exporting.__name__)
    key = digest(["stitches", sorted(shapes), batch, code], exporting.versions())
    model = context.store.get_bytes(key)
    if model is None:
        parts = exporting.Parallel(stitching.build(*shape) for shape in shapes.values())
        examples = tuple(_example(source, batch) for source, _ in shapes.values())
        outputs, inputs = [f"out {key}" for key in shapes], [f"in {key}" for key in shapes]
        model = exporting.export(parts, examples, outputs, input_names=inputs)
        context.store.put_bytes(key, model, note="onnx stitches")
    slicer, sessions = exporting.Slicer(model), {}
    for shape in shapes:
        session = context.engine.open(slicer.slice((f"in {shape}",), (f"out {shape}",)))
        stack.callback(session.close)
        sessions[shape] = session
    return sessions
