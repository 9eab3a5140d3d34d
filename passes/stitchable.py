"""stitchable: what a stitch between any two blocks will lose, from the donors alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from derc import fronts
from derc.artifacts import BlockRef, CutId, CutZoo, Partition, StitchLosses, digest
from derc.pipeline import Context
from derc.stitchability import Place, Sample, blurred, maps, places, unexplained
from derc.stitching import keeps_places

LEVELS = (0.03, 0.1, 0.2, 0.35, 0.55, 0.8, 1.0)
"""Shares of what is unexplained at which a donor is looked at."""
Pair = tuple[CutId, CutId]


@dataclass(frozen=True)
class Stitchable:
    """Between the partition's blocks: every stitch's regression on `most` probe images, donors' tolerance on `images`.

    Of more than `pairs` pairs of cuts nothing is looked at, and the similarities have to do. Deterministic.
    """

    most: int = 512
    images: int = 64
    pairs: int = 100_000
    batch: int = 64
    name: ClassVar[str] = "stitchable"
    produces: ClassVar[type] = StitchLosses

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.probe.digest)

    def run(self, context: Context, cuts: CutZoo, partition: Partition) -> StitchLosses:
        pairs = stitched_pairs(cuts, partition)
        if len(pairs) > self.pairs:
            context.console.say(f"{len(pairs)} pairs of cuts are too many to look at: similarity says what is alike")
            return StitchLosses((), {}, {})
        samples = self._samples(context, cuts, partition, pairs)
        left: dict[str, dict[str, float]] = defaultdict(dict)
        for (given, place), targets in samples.by_source.items():
            values = unexplained(samples.of[given, place], [samples.of[target] for target in targets])
            for (taken, _), value in zip(targets, values, strict=True):
                left[StitchLosses.name(given)][StitchLosses.name(taken)] = value
        ends = sorted({taken for _, taken in pairs}, key=lambda cut: (cut.donor, cut.cut))
        agreement = {StitchLosses.name(cut): self._agreement(context, cut) for cut in ends}
        return StitchLosses(LEVELS, dict(left), agreement)

    def _samples(self, context: Context, cuts: CutZoo, partition: Partition, pairs: list[Pair]) -> _Samples:
        """One pass per donor over the probe images."""
        probe = context.data.probe.first(self.most)
        samples = _Samples.of_pairs(cuts, pairs, len(probe))
        for name in context.console.track(partition.blocks, "stitchable", len(partition.blocks)):
            chain = [fronts.block(context.lowered[name], block.plain) for block in partition.blocks[name]]
            for end, block in enumerate(partition.blocks[name][:-1], 1):
                wanted = samples.at(CutId(name, block.last))
                kind = cuts.donors[name].cuts[block.last].type
                for value in context.fronts.run(probe, self.batch, chain[:end]) if wanted else ():
                    for sample in wanted:
                        sample.add(maps(value, kind))
        return samples

    @torch.no_grad()
    def _agreement(self, context: Context, cut: CutId) -> tuple[float, ...]:
        """For each level of what is unexplained, the share of images on which the donor's answer stays as it was."""
        lowered, probe = context.lowered[cut.donor], context.data.probe.first(self.images)
        before = fronts.block(lowered, BlockRef(cut.donor, 0, cut.cut, 0))
        rest = fronts.block(lowered, BlockRef(cut.donor, cut.cut, len(lowered.units), 0))
        run = partial(context.fronts.run, probe, self.batch)
        value, own = torch.cat(list(run([before]))), torch.cat(list(run([before, rest]))).argmax(1)
        generator, found = torch.Generator().manual_seed(0), []
        for level in LEVELS:
            changed = blurred(value, lowered.cuts[cut.cut].type, level, generator)
            answers = torch.cat([rest.module(part.clone()) for part in changed.split(self.batch)]).argmax(1)
            found.append(float((answers == own).double().mean()))
        return tuple(found)


@dataclass
class _Samples:
    """Rows of cuts at the places that their stitches need, and which targets each source has at a place."""

    of: dict[tuple[CutId, Place], Sample]
    by_source: dict[tuple[CutId, Place], list[tuple[CutId, Place]]]

    @classmethod
    def of_pairs(cls, cuts: CutZoo, pairs: list[Pair], images: int) -> _Samples:
        found = cls({}, defaultdict(list))
        for given, taken in pairs:
            one, other = places(*(cuts.donors[cut.donor].cuts[cut.cut].type for cut in (given, taken)))
            for key in ((given, one), (taken, other)):
                found.of.setdefault(key, Sample(key[1], images))
            found.by_source[given, one].append((taken, other))
        return found

    def at(self, cut: CutId) -> list[Sample]:
        return [sample for (one, _), sample in self.of.items() if one == cut]


def stitched_pairs(cuts: CutZoo, partition: Partition) -> list[Pair]:
    """The cuts between blocks that a stitch may join, in a fixed order, each pair once."""
    found: dict[Pair, None] = {}
    for chain in partition.blocks.values():
        for given in chain[:-1]:
            for other in partition.blocks.values():
                for taken in other[1:]:
                    one, two = CutId(given.donor, given.last), CutId(taken.donor, taken.first)
                    types = [cuts.donors[cut.donor].cuts[cut.cut].type for cut in (one, two)]
                    if taken.set > given.set and one != two and keeps_places(*types):
                        found[one, two] = None
    return list(found)
