"""Blocks that may begin and end at any cuts of their donor: their graph, and what is known of their latencies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from derc import stitching
from derc.artifacts import Array, BlockRef, CutDonor, CutZoo, Latency, LatencyTable, Partition
from derc.engine import PRECISIONS
from derc.errors import DercError, UsageError
from derc.joints import Ends
from derc.layered import Layered, assembled, variants, with_ends
from derc.stitch_latency import Shapes, formed, predict
from derc.stitching import PLAIN, Forms

LEAST_STITCHES = 4
"""Known stitches that a cost law of three coefficients needs."""
COSTS = ("macs", "bytes")
"""What bounds a unit's latency, computing or moving data."""
MOST_STEPS = 2_000_000
"""Edges beyond which the graph would not fit into a usual memory with everything that is learnt of them."""


def build(
    cuts: CutZoo,
    partition: Partition,
    heads: tuple[str, ...] = (),
    *,
    timed: Collection[str] | None = None,
    weights: Mapping[str, int] | None = None,
) -> Layered:
    """The graph of all assemblies of blocks between any cuts, each of which ends deeper in its donor than the last.

    Depth is the share of a donor's multiply-accumulates; no donor goes over its own units again at once. Blocks that
    follow each other in their donor and are computed in one precision are one block here, so that every network is one
    path; a donor as a whole is its assembly of the partition. The equivalence set of a block is the one that it begins
    in. For the rest see `layered.build`. Raises DercError where `timed` names no block, UsageError where the graph
    would be too large.
    """
    blocks = tuple(variants(_all(cuts, partition), timed))
    if not blocks:
        raise DercError("the latency table has no block of these donors: profile the zoo again")
    sets = 1 + max(block.set for chain in partition.blocks.values() for block in chain)
    depth = {name: depths(donor) for name, donor in cuts.donors.items()}
    begins = np.array([depth[b.donor][b.first] for b in blocks])
    ends_at = np.array([depth[b.donor][b.last] for b in blocks])
    inner_end = np.array([b.last < len(cuts.donors[b.donor].units) for b in blocks])
    inner_begin = np.array([b.first > 0 for b in blocks])
    ends, precision = Ends.of(cuts, blocks, partition.forms), np.array([PRECISIONS.index(b.precision) for b in blocks])
    merged = ends.joined & (precision[:, None] == precision[None, :])
    ahead = (ends_at[None, :] > ends_at[:, None]) & inner_end[:, None] & inner_begin[None, :]
    again = (ends.donor[:, None] == ends.donor[None, :]) & (ends.first[None, :] < ends.last[:, None])
    tail, head = np.nonzero(ahead & ~again & ~merged & (ends.joined | ends.legal))
    if len(tail) > MOST_STEPS:
        raise UsageError(
            f"blocks between any cuts of these donors join in {len(tail)} ways, more than {MOST_STEPS}: "
            "name fewer donors, or leave --interval out"
        )
    last = np.array([not heads or b.donor in heads for b in blocks]) & ~inner_end
    tail, head = with_ends(tail, head, ~inner_begin, last)
    between = (tail >= 0) & (head < len(blocks))
    gap = np.maximum(begins[head % len(blocks)] - ends_at[tail], 0) * sets
    skipped = np.where(between, gap, 0.0)
    donors = {b.donor for b in blocks if b.first == 0 and b.last == len(cuts.donors[b.donor].units)}
    whole = {name: chain for name, chain in partition.blocks.items() if name in donors}
    return assembled(cuts, blocks, sets, ends_at, ends, tail, head, skipped, weights or {}, whole)


def _all(cuts: CutZoo, partition: Partition) -> Iterator[BlockRef]:
    """Every block between two cuts, by donor."""
    for name, chain in partition.blocks.items():
        count = len(cuts.donors[name].units)
        begins_in = {cut: block.set for block in chain for cut in range(block.first, block.last)}
        for first in range(count):
            for last in range(first + 1, count + 1):
                yield BlockRef(name, first, last, begins_in[first])


def depths(donor: CutDonor) -> Array:
    """How deep in its donor each cut lies, from 0 to 1, rising even where nothing is multiplied, (cuts)."""
    macs = np.array([unit.macs for unit in donor.units], np.float64)
    shares = macs / max(macs.sum(), 1.0) + 1e-6
    return np.concatenate([[0.0], np.cumsum(shares) / shares.sum()])


@dataclass(frozen=True)
class Piece:
    """A block of the partition, and the share of it that lies in another block."""

    block: BlockRef
    share: float


def extended(table: LatencyTable, cuts: CutZoo, partition: Partition) -> LatencyTable:
    """The table with a predicted latency for every block between two cuts, from those of the partition's blocks.

    A block takes what the partition's blocks inside it take, and a share of those that it cuts through: the larger of
    its shares of their multiply-accumulates and of their activations, for one or the other is what bounds them. That
    never adds up to less than the whole, so that an upper budget is kept. A block stays out where one of those that it
    touches is not in the table. Stitches between any cuts follow the cost law of those that are known. Distortions are
    added up; what the table knows itself stays. Raises UsageError where too few stitches are known for the law.
    """
    blocks, distortion, weights = dict(table.blocks), dict(table.distortion), dict(table.weights)
    for block in _all(cuts, partition):
        touched = pieces(block, partition.blocks[block.donor], cuts.donors[block.donor])
        for precision in PRECISIONS:
            form = replace(block, precision=precision)
            names = [str(replace(piece.block, precision=precision)) for piece in touched]
            if str(form) in blocks or any(name not in table.blocks for name in names):
                continue
            blocks[str(form)] = _sum([(table.blocks[n], p.share) for n, p in zip(names, touched, strict=True)])
            if all(name in table.distortion for name in names):
                distortion[str(form)] = sum(table.distortion[name] for name in names)
            if all(p.share == 1.0 for p in touched) and all(name in table.weights for name in names):
                weights[str(form)] = sum(table.weights[name] for name in names)
    stitches = _stitches(cuts, partition.forms, table.stitches)
    return replace(table, blocks=blocks, stitches=stitches, distortion=distortion, weights=weights)


def _stitches(cuts: CutZoo, forms: Forms, known: Mapping[str, Latency]) -> dict[str, Latency]:
    """Latencies of the stitches between all cuts: the known ones, and what the law of the measured ones says."""
    inner = {cut.type for donor in cuts.donors.values() for cut in donor.cuts[1:-1]}
    shapes: Shapes = {
        stitching.key(source, target): (source, target, PLAIN)
        for source in sorted(inner, key=stitching.describe)
        for target in sorted(inner, key=stitching.describe)
        if stitching.keeps_places(source, target)
    }
    shapes |= formed(cuts, forms)
    lacking = shapes.keys() - known.keys()
    measured = {key: one for key, one in known.items() if key in shapes and one.provenance != "predicted"}
    measured = measured if len(measured) >= LEAST_STITCHES else {key: known[key] for key in known if key in shapes}
    if not lacking:
        return dict(known)
    if len(measured) < LEAST_STITCHES:
        raise UsageError(
            f"--interval needs the latencies of at least {LEAST_STITCHES} stitches, and the table has {len(measured)}: "
            "profile a zoo of more donors, or leave --interval out"
        )
    return {**predict(shapes, measured), **known}


def pieces(block: BlockRef, chain: tuple[BlockRef, ...], donor: CutDonor) -> list[Piece]:
    """The partition's blocks that a block touches, with its share of each; 1 where all of it lies inside."""
    found = []
    for one in chain:
        low, high = max(block.first, one.first), min(block.last, one.last)
        if low < high:
            inside, whole = donor.units[low:high], donor.units[one.first : one.last]
            shares = [sum(getattr(u, n) for u in inside) / max(sum(getattr(u, n) for u in whole), 1) for n in COSTS]
            found.append(Piece(one, 1.0 if len(inside) == len(whole) else min(max(shares), 1.0)))
    return found


def _sum(parts: list[tuple[Latency, float]]) -> Latency:
    """A latency that is made up of shares of others: predicted, with their intervals added up."""
    ms, low, high = (sum(getattr(one, name) * share for one, share in parts) for name in ("ms", "low_ms", "high_ms"))
    return Latency(ms, low, high, "predicted", 0, stable=False)
