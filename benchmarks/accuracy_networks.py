"""The networks that the accuracy benchmark trains: an assembly in each of its beginnings, and how each is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from derc.artifacts import Assembly, BlockRef, Joint, StitchedAssembly
from derc.assembled import Assembled, assemble, live, seeded, with_buffers
from derc.batchnorm import reestimated
from derc.data import Data, Split
from derc.errors import UsageError
from derc.ir import TensorType
from derc.parts import check_joint, parts
from derc.training import TrainOptions, train
from derc.training.examples import as_examples
from derc.training.outcome import Trained
from derc.training.score import accuracy, correct
from derc.workspace import LiveDonors

BATCH = 32
FROZEN = "frozen"
RATES = {
    "random": (1e-3, "train"),
    "paper": (1e-3, "train"),
    "scratch": (3e-3, "train"),
}
"""Learning rate and batch norms by what is trained, chosen on a development split (benchmarks/accuracy_rates.py)."""
TUNED = ("assembly", "donor")
"""What is trained once with each pair of the size's grid; the validation images choose."""
FRESH = ("random", "paper", "scratch")
"""What is worth nothing before it is trained, so that its trained state is kept in any case."""


@dataclass(frozen=True)
class Net:
    """A network of its own (nothing is shared with a donor) and the numbers of its parts that are no donor's block.

    `head` is the path of a last layer that was fitted to the task's labels, which is no donor's either; "": none.
    """

    network: Assembled
    added: frozenset[int]
    head: str = ""

    def only_added(self, path: str) -> bool:
        """Whether this module or parameter is one of those that are no donor's."""
        pieces = path.split(".")
        fitted = bool(self.head) and f"{path}.".startswith(f"{self.head}.")
        return fitted or (len(pieces) > 1 and int(pieces[1]) in self.added)


def own(network: Assembled, added: frozenset[int], head: str = "") -> Net:
    """A copy that may be trained, in the memory format in which a processor trains fastest."""
    return Net(copy.deepcopy(network).to(memory_format=torch.channels_last), added, head)


def added(assembly: Assembly, lowered: LiveDonors) -> frozenset[int]:
    return frozenset(n for n, part in enumerate(parts(assembly, lowered)) if not isinstance(part.spec, BlockRef))


def head(assembly: Assembly, lowered: LiveDonors) -> str:
    """Path of the head that was fitted for the donor of the last block, "" where it has its own."""
    fitted = lowered.zoo[assembly.blocks[-1].donor].head
    return "" if fitted is None else f"parts.{len(parts(assembly, lowered)) - 1}.{fitted.path}"


def stitched_net(stitched: StitchedAssembly, lowered: LiveDonors) -> Net:
    """As derc gives it."""
    assembly = stitched.assembly
    return own(live(stitched, lowered), added(assembly, lowered), head(assembly, lowered))


def random_net(assembly: Assembly, lowered: LiveDonors, seed: int) -> Net:
    """The same blocks with random stitches; with donors that have no weights, the architecture from scratch."""
    with seeded(seed):
        return own(assemble(assembly, lowered), added(assembly, lowered), head(assembly, lowered))


def paper_net(assembly: Assembly, lowered: LiveDonors, fresh: LiveDonors, seed: int) -> Net:
    """Pretrained blocks with a random stem (the first donor's up to its first weights), stitches and head.

    Stitches are the paper's (batch norm, convolution, leaky ReLU) where they lead from one type to the other, else
    linear ones.
    """
    modules, new = list[nn.Module](), set[int]()
    with seeded(seed):
        every = parts(replace(assembly, joints=joints(assembly, lowered)), lowered)
        for part in every:
            if not isinstance(part.spec, BlockRef):
                new.add(len(modules))
                modules.append(part.build())
                continue
            block, (first, last) = part.spec, (part.spec.first, part.spec.last)
            if part is every[0]:
                first = stem_end(block, lowered)
                new.add(len(modules))
                modules.append(fresh[block.donor].block(block.first, first))
            if part is every[-1]:
                last -= 1
            if first < last:
                modules.append(lowered[block.donor].block(first, last))
            if part is every[-1]:
                new.add(len(modules))
                modules.append(fresh[block.donor].block(last, block.last))
    return own(Assembled(modules).eval(), frozenset(new))


def stem_end(block: BlockRef, lowered: LiveDonors) -> int:
    """The first cut behind the first weights of a donor, at most the block's end."""
    for end in range(block.first + 1, block.last):
        if any(True for _ in lowered[block.donor].block(block.first, end).parameters()):
            return end
    return block.last


def joints(assembly: Assembly, lowered: LiveDonors) -> tuple[Joint | None, ...]:
    """For each block, the paper's stitch in front of it."""
    found: list[Joint | None] = []
    for number, block in enumerate(assembly.blocks):
        if assembly.joint(number) is None:
            found.append(None)
            continue
        before = assembly.blocks[number - 1]
        found.append(
            paper_joint(lowered[before.donor].cuts[before.last].type, lowered[block.donor].cuts[block.first].type)
        )
    return tuple(found)


def paper_joint(source: TensorType, target: TensorType) -> Joint:
    """The paper's stitch between two types, or a linear one where it does not fit."""
    if source.spatial and target.spatial and source.spatial[0] >= target.spatial[0]:
        joint = Joint("dery", source.spatial[0] // target.spatial[0])
        try:
            check_joint(joint, source, target)
        except UsageError:
            return Joint()
        return joint
    return Joint()


@dataclass(frozen=True)
class Lesson:
    """How a network is trained: with the rate and norms of its `kind` or as `given`, `epochs` over the images.

    Kinds in TUNED are trained with each pair of the size's grid in turn.
    """

    kind: str
    epochs: int
    seed: int
    teacher: nn.Module | None = None
    given: tuple[float, str] | None = None


def teach(net: Net, data: Data, images: int, lesson: Lesson) -> Trained:
    """Train a network in place; the state that is best on the validation images stays."""
    rate, norms = lesson.given or RATES[lesson.kind]
    options = TrainOptions(
        epochs=lesson.epochs,
        batch=BATCH,
        lr=rate,
        norms=norms,
        seed=lesson.seed,
        device="cpu",
        allow_worse=lesson.kind in FRESH,
    )
    trains = net.only_added if lesson.kind == FROZEN else lambda _: True
    assert data.more is not None
    return train(net.network, data.more(images), data.validation, options, trains=trains, teacher=lesson.teacher)


def forms(lesson: Lesson | None, grid: Sequence[tuple[float, str]]) -> tuple[Lesson | None, ...]:
    """The trainings of which the validation images choose one."""
    if lesson is None or lesson.given or lesson.kind not in TUNED:
        return (lesson,)
    return tuple(replace(lesson, given=pair) for pair in grid)


def recalibrated_net(net: Net, data: Data) -> Net:
    """The same donor with the batch-norm statistics of the probe images, or as it is where that is no better."""
    (found,) = reestimated([net.network], (x for x, _ in data.probe.batches(BATCH)), [True])
    other = Net(with_buffers(net.network, found).eval(), net.added) if found else net  # type: ignore[arg-type]
    before, after = (accuracy(one.network, as_examples(data.validation)) for one in (net, other))
    return other if after > before else net


def judged(network: nn.Module, validation: Split, heldout: Split) -> dict[str, float | str]:
    """The accuracy that chooses and the one that is reported, and which validation images are answered right."""
    right = correct(network, as_examples(validation))
    return {
        "validation": float(right.mean()),
        "heldout": accuracy(network, as_examples(heldout)),
        "right": np.packbits(right).tobytes().hex(),
    }
