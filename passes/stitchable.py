"""stitchable: what form a stitch between any two blocks takes, and what it will lose, from the donors alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from derc import fronts
from derc.artifacts import BlockRef, CutId, CutZoo, Partition, StitchLosses, digest
from derc.fitting import fit
from derc.ir import TensorType
from derc.pipeline import Context
from derc.stitch_forms import MARGIN, decided, forms
from derc.stitchability import Place, Regressor, Sample, blurred, maps, places, tokens
from derc.stitching import MAPS, PLAIN, REGRIDS, Form, Forms, build, keeps_places

LEVELS = (0.03, 0.1, 0.2, 0.35, 0.55, 0.8, 1.0)
"""Shares of what is unexplained at which a donor is looked at."""
Pair = tuple[CutId, CutId]


@dataclass(frozen=True)
class Stitchable:
    """Between the partition's blocks: every stitch's regression on `most` probe images, donors' tolerance on `images`.

    A stitch takes the form that `derc.stitch_forms` decides for, of those with one of `regrids` and of `maps`. Of more
    than `pairs` pairs of cuts nothing is looked at, the similarities have to do, and all forms are the default.
    Deterministic.
    """

    most: int = 512
    images: int = 64
    pairs: int = 100_000
    batch: int = 64
    regrids: tuple[str, ...] = REGRIDS
    maps: tuple[str, ...] = MAPS
    margin: float = MARGIN
    name: ClassVar[str] = "stitchable"
    produces: ClassVar[type] = StitchLosses

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.probe.digest)

    def run(self, context: Context, cuts: CutZoo, partition: Partition) -> StitchLosses:
        pairs = stitched_pairs(cuts, partition)
        if len(pairs) > self.pairs:
            context.console.say(f"{len(pairs)} pairs of cuts are too many to look at: similarity says what is alike")
            return StitchLosses((), {}, {})
        return self.decide(context, cuts, partition)[0]

    def decide(
        self, context: Context, cuts: CutZoo, partition: Partition
    ) -> tuple[StitchLosses, dict[Pair, dict[Form, float]]]:
        """The losses of all stitches in the forms that they take, and what each form of each leaves unexplained."""
        pairs = stitched_pairs(cuts, partition)
        ends = sorted({taken for _, taken in pairs}, key=lambda cut: (cut.donor, cut.cut))
        agreement = {StitchLosses.name(cut): self._agreement(context, cut) for cut in ends}
        unexplained: dict[str, dict[str, float]] = defaultdict(dict)
        forms: Forms = defaultdict(dict)
        every = self._left(self._samples(context, cuts, partition, pairs))
        for (given, taken), left in every.items():
            one, other = StitchLosses.name(given), StitchLosses.name(taken)
            kept = partial(self._kept, context, given, taken)
            form = decided(*types(cuts, given, taken), left, LEVELS, agreement[other], kept, self.margin)
            unexplained[one][other] = left[form]
            if form != PLAIN:
                forms[one][other] = form
        return StitchLosses(LEVELS, dict(unexplained), agreement, dict(forms)), every

    def _left(self, samples: _Samples) -> dict[Pair, dict[Form, float]]:
        """What each form of each stitch leaves unexplained."""
        left: dict[Pair, dict[Form, float]] = {pair: {} for pair in samples.pairs}
        for (given, place), targets in samples.by_source.items():
            regressor = Regressor(samples.of[given, place])
            for taken, other, some in targets:
                found = regressor.left(samples.of[taken, other], some)
                left[given, taken] |= dict(zip(some, found, strict=True))
        return left

    def _forms(self, source: TensorType, target: TensorType) -> dict[str, list[Form]]:
        """The forms that are looked at, by regridding."""
        found: dict[str, list[Form]] = defaultdict(list)
        for form in forms(source, target):
            if form.regrid in self.regrids and form.map in self.maps:
                found[form.regrid].append(form)
        return found

    def _samples(self, context: Context, cuts: CutZoo, partition: Partition, pairs: list[Pair]) -> _Samples:
        """One pass per donor over the probe images."""
        probe = context.data.probe.first(self.most)
        samples = _Samples({}, {}, defaultdict(list))
        for pair in pairs:
            samples.add(pair, *types(cuts, *pair), self._forms(*types(cuts, *pair)), len(probe))
        for name in context.console.track(partition.blocks, "stitchable", len(partition.blocks)):
            chain = [fronts.block(context.lowered[name], block.plain) for block in partition.blocks[name]]
            for end, block in enumerate(partition.blocks[name][:-1], 1):
                wanted = samples.at(CutId(name, block.last))
                kind = cuts.donors[name].cuts[block.last].type
                for value in context.fronts.run(probe, self.batch, chain[:end]) if wanted else ():
                    for sample in wanted:
                        sample.add(maps(value, kind), tokens(value, kind))
        return samples

    @torch.no_grad()
    def _agreement(self, context: Context, cut: CutId) -> tuple[float, ...]:
        """For each level of what is unexplained, the share of images on which the donor's answer stays as it was."""
        value, tail = self._value(context, cut), self._tail(context, cut)
        kind, generator, own = context.lowered[cut.donor].cuts[cut.cut].type, torch.Generator(), tail.answers(value)
        generator.manual_seed(0)
        return tuple(tail.kept(blurred(value, kind, level, generator), own) for level in LEVELS)

    @torch.no_grad()
    def _kept(self, context: Context, given: CutId, taken: CutId, form: Form) -> float:
        """The share of images on which the donor behind a stitch of this form, fitted on them, answers as it does."""
        ends = [context.lowered[cut.donor].cuts[cut.cut].type for cut in (given, taken)]
        stitch, tail = build(ends[0], ends[1], form), self._tail(context, taken)
        source, target = self._value(context, given), self._value(context, taken)
        fit(stitch, (source,), (target,), (f"donor {given.donor}", f"donor {taken.donor}"))
        return tail.kept(stitch.eval()(source), tail.answers(target))

    def _value(self, context: Context, cut: CutId) -> torch.Tensor:
        """What the first images give at a cut."""
        front = fronts.block(context.lowered[cut.donor], BlockRef(cut.donor, 0, cut.cut, 0))
        return torch.cat(list(context.fronts.run(context.data.probe.first(self.images), self.batch, [front])))

    def _tail(self, context: Context, cut: CutId) -> Tail:
        lowered = context.lowered[cut.donor]
        rest = fronts.block(lowered, BlockRef(cut.donor, cut.cut, len(lowered.units), 0))
        return Tail(rest.module, self.batch)


@dataclass(frozen=True)
class Tail:
    """A donor from a cut on, which takes `batch` images at once."""

    module: nn.Module
    batch: int

    def kept(self, value: torch.Tensor, own: torch.Tensor) -> float:
        """The share of images on which its answer for `value` is its `own`."""
        return float((self.answers(value) == own).double().mean())

    def answers(self, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.module(part.clone()) for part in torch.split(value, self.batch)]).argmax(1)


@dataclass
class _Samples:
    """Rows of cuts at the places that their stitches need, and which targets each source has there, in what forms."""

    of: dict[tuple[CutId, Place], Sample]
    pairs: dict[Pair, None]
    by_source: dict[tuple[CutId, Place], list[tuple[CutId, Place, list[Form]]]]

    def add(
        self, pair: Pair, source: TensorType, target: TensorType, forms: dict[str, list[Form]], images: int
    ) -> None:
        self.pairs[pair] = None
        given, taken = pair
        for regrid, some in forms.items():
            one, other = places(source, target, regrid)
            for key in ((given, one), (taken, other)):
                self.of.setdefault(key, Sample(key[1], images))
            self.by_source[given, one].append((taken, other, some))

    def at(self, cut: CutId) -> list[Sample]:
        return [sample for (one, _), sample in self.of.items() if one == cut]


def types(cuts: CutZoo, given: CutId, taken: CutId) -> tuple[TensorType, TensorType]:
    """Those of two cuts."""
    one, other = (cuts.donors[cut.donor].cuts[cut.cut].type for cut in (given, taken))
    return one, other


def stitched_pairs(cuts: CutZoo, partition: Partition) -> list[Pair]:
    """The cuts between blocks that a stitch may join, in a fixed order, each pair once."""
    found: dict[Pair, None] = {}
    for chain in partition.blocks.values():
        for given in chain[:-1]:
            for other in partition.blocks.values():
                for taken in other[1:]:
                    one, two = CutId(given.donor, given.last), CutId(taken.donor, taken.first)
                    if taken.set > given.set and one != two and keeps_places(*types(cuts, one, two)):
                        found[one, two] = None
    return list(found)
