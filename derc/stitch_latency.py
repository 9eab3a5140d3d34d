"""Latency of stitches: which shapes may be needed, which to measure, and a cost law for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from derc import stitching
from derc.artifacts import Array, CutId, CutZoo, Latency, Partition, StitchLosses
from derc.ir import TensorType
from derc.stitching import PLAIN, Form, Forms

Shape = tuple[TensorType, TensorType, Form]
Shapes = dict[str, Shape]


def stitch_shapes(cut_zoo: CutZoo, partition: Partition) -> Shapes:
    """The distinct (source, target, form) of all stitches that an assembly may need, by `stitching.key`.

    A stitch leads from the end of a block to the start of any block of a later set, unless one donor just goes on. One
    that does nothing is not among them.
    """
    blocks = [block for chain in partition.blocks.values() for block in chain]
    shapes: Shapes = {}
    for before in blocks:
        source = cut_zoo.donors[before.donor].cuts[before.last].type
        for after in blocks:
            target = cut_zoo.donors[after.donor].cuts[after.first].type
            goes_on = before.donor == after.donor and before.last >= after.first
            if after.set > before.set and not goes_on and stitching.keeps_places(source, target):
                places = CutId(before.donor, before.last), CutId(after.donor, after.first)
                one, other = map(StitchLosses.name, places)
                _add(shapes, source, target, partition.forms.get(one, {}).get(other, PLAIN))
    return shapes


def formed(cuts: CutZoo, forms: Forms) -> Shapes:
    """The same of the stitches that `forms` names."""
    shapes: Shapes = {}
    for one, others in forms.items():
        for other, form in others.items():
            given, taken = map(StitchLosses.cut, (one, other))
            ends = (cuts.donors[cut.donor].cuts[cut.cut].type for cut in (given, taken))
            _add(shapes, next(ends), next(ends), form)
    return shapes


def _add(shapes: Shapes, source: TensorType, target: TensorType, form: Form) -> None:
    if not stitching.free(source, target, form):
        shapes[stitching.key(source, target, form)] = (source, target, form)


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


def _features(source: TensorType, target: TensorType, form: Form = PLAIN) -> Array:
    """(1, mega-MACs, megabytes in and out) of one stitch, for one image."""
    macs = stitching.cost(source, target, form).macs
    return np.array([1.0, macs / 1e6, 4 * stitching.moved(source, target, form) / 1e6])
