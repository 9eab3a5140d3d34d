"""match: train an assembly's stitches without labels until its outputs agree with those of a donor."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from derc import fronts
from derc.amounts import Amount
from derc.artifacts import Assembly, BlockRef, Matched, StitchedAssembly, digest
from derc.data import Split
from derc.errors import UsageError
from derc.fronts import Step
from derc.judge import columns_of
from derc.matching import TAIL, Learner, Lesson, learner
from derc.matching_training import Training
from derc.parts import entry
from derc.pipeline import Context

LARGEST = 2**31
"""Bytes of different images that are held at once; more are shown in several passes."""
PER_SECOND = 100
"""Different images that are read for each second of matching, beside the probes."""


@dataclass(frozen=True)
class Match:
    """Trains what derc added to an assembly for `images` shown, or for `seconds`; see `Training`.

    `teacher` is "tail", the donor of the last block, or another donor's name. The images are the probes and what the
    data set has beyond its splits; those of the validation split are looked at without their labels. The same network
    comes out each time where images are counted, not seconds.
    """

    images: int = 0
    seconds: float = 0.0
    teacher: str = TAIL
    name: ClassVar[str] = "match"
    produces: ClassVar[type] = Matched

    def inputs(self, context: Context) -> str:
        donors = [donor.digest() for donor in context.zoo.donors]
        return digest(donors, context.data.digest(), self._train(context).digest, context.seed)

    def run(self, context: Context, stitched: StitchedAssembly) -> Matched:
        start, train = time.perf_counter(), self._train(context)
        front, network = learner(stitched, context.lowered)
        lesson = self.lesson(context, stitched.assembly.plain, front)
        amount = Amount(self.images, self.seconds)
        training = Training(network, lesson, train, context.data.validation, amount, context.seed, context.console.say)
        trained = training.run()
        return Matched(
            stitched=_carried(stitched, trained.network),
            teacher=self._teacher(stitched.assembly),
            images=trained.images,
            distinct=min(trained.images, len(train)),
            seconds=round(time.perf_counter() - start, 3),
            before=trained.before,
            after=trained.after,
            features=not lesson.answers,
            statistics=bool(trained.network.buffers),
            note=trained.note,
        )

    def _train(self, context: Context) -> Split:
        probe = context.data.probe
        wanted = self.images or len(probe) + int(PER_SECOND * self.seconds)
        return context.data.training(min(wanted, max(1, LARGEST // max(1, probe.images[0].nbytes))))

    def _teacher(self, assembly: Assembly) -> str:
        return assembly.blocks[-1].donor if self.teacher == TAIL else self.teacher

    def lesson(self, context: Context, assembly: Assembly, front: tuple[Step, ...]) -> Lesson:
        """What the network is to agree with. Raises UsageError where the teacher does not fit it."""
        last, name = assembly.blocks[-1], self._teacher(assembly)
        donor, other = context.lowered[last.donor], context.lowered[name]
        image = entry(assembly, context.lowered).shape
        if other.cuts[0].type.shape != image:
            raise UsageError(
                f"{name} takes images of {other.cuts[0].type.shape}, not {image}: it cannot be the teacher"
            )
        end = last.last if assembly.head else len(donor.units) - 1
        features = (fronts.block(donor, BlockRef(last.donor, 0, end, 0)),)
        head = fronts.block(donor, BlockRef(last.donor, end, len(donor.units), 0)) if assembly.head is None else None
        names = f"donor {assembly.blocks[0].donor}", f"donor {last.donor}", f"donor {name}"
        lesson = Lesson(context.recall, front, features, head, answers=assembly.head is None, names=names)
        if name == last.donor:
            return lesson
        whole = (fronts.block(other, BlockRef(name, 0, len(other.units), 0)),)
        return replace(lesson, teacher=whole, columns=_columns(context, assembly, name))


def _columns(context: Context, assembly: Assembly, teacher: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The outputs of network and teacher that stand for the same classes, None: all, in order."""
    mine, other = (context.zoo[name].labels for name in (assembly.blocks[-1].donor, teacher))
    if assembly.head is None and mine is not None and mine == other:
        return None
    columns = columns_of(mine, context.data), columns_of(other, context.data)
    if assembly.head is not None or columns[0] is None or columns[1] is None:
        raise UsageError(f"{teacher} and {assembly} answer different questions: match it to its tail's donor")
    return columns[0], columns[1]


def _carried(stitched: StitchedAssembly, network: Learner) -> StitchedAssembly:
    """The assembly with what the network has learnt; a fresh head, which learns nothing, keeps its state."""
    learnt = tuple({k: v.numpy() for k, v in state.items()} for state in network.state())
    buffers = stitched.buffers
    if network.buffers:
        blocks = range(len(stitched.assembly.blocks))
        old = dict(enumerate(stitched.buffers))
        buffers = tuple({**old.get(place, {}), **network.buffers.get(place, {})} for place in blocks)
    return replace(stitched, states=learnt + stitched.states[len(learnt) :], buffers=buffers)
