"""Matching without labels: what a stitched network is to agree with, the network that learns it, how far it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from derc import fronts
from derc.artifacts import Array, BlockRef, StitchedAssembly
from derc.assembled import with_buffers
from derc.data import Split
from derc.errors import UsageError
from derc.fronts import Step
from derc.lowered import Lowered
from derc.parts import parts
from derc.recall import Recall, chunks

TAIL, BEST = "tail", "best"
"""Teachers that are not a donor's name: the last block's donor, and the donor that is judged the best."""
TEMPERATURE = 2.0
"""Softens both answers before they are compared (Hinton et al. 2015)."""
FEATURES = 0.3
"""Weight of the tail donor's last features beside its answers, as a share of their variance."""


@dataclass(frozen=True)
class Goal:
    """What a batch should give: `outputs` (n, classes) of the teacher, `features` of the tail donor; None: anything."""

    outputs: torch.Tensor | None
    features: torch.Tensor | None


@dataclass(frozen=True)
class Lesson:
    """The teacher, and the front of the network that learns, which stays as it is.

    `features` are the tail donor's steps up to its last unit, `head` that unit; `teacher` are those of another donor
    whose outputs are wanted in place of the tail's. `columns` are the outputs of learner and teacher that stand for the
    same classes, None: all. Where `answers` is False, the outputs mean different things and features alone count.
    `names` is what errors call the front, the tail's donor and the teacher.
    """

    recall: Recall
    front: tuple[Step, ...]
    features: tuple[Step, ...]
    head: Step | None
    teacher: tuple[Step, ...] = ()
    columns: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    answers: bool = True
    names: tuple[str, str, str] = ("the front", "the tail's donor", "the teacher")

    def inputs(self, split: Split, numbers: torch.Tensor) -> torch.Tensor:
        """What reaches the first part that is trained; raises UsageError where it is not finite."""
        x = self.recall.outputs(split, self.front, numbers) if self.front else split.take(numbers)
        return _finite(x, self.names[0])

    @torch.no_grad()
    def goal(self, split: Split, numbers: torch.Tensor) -> Goal:
        """What the network should give for these images; raises UsageError where that is not finite."""
        if self.teacher:
            outputs = self.recall.outputs(split, self.teacher, numbers)
            return Goal(_finite(outputs, self.names[2]), None)
        features = _finite(self.recall.outputs(split, self.features, numbers), self.names[1])
        if not self.answers or self.head is None:
            return Goal(None, features)
        return Goal(_finite(self.head.module(features.clone()), self.names[1]), features)

    def picked(self, outputs: torch.Tensor, *, learner: bool) -> torch.Tensor:
        """The outputs that are compared."""
        return outputs if self.columns is None else outputs[:, list(self.columns[not learner])]


def _finite(x: torch.Tensor, who: str) -> torch.Tensor:
    if not torch.isfinite(x).all():
        raise UsageError(f"{who} gives values that are not finite, so nothing can be matched: leave it out")
    return x


@dataclass
class Learner:
    """The network from its first stitch on: `added` are trained, all else is frozen.

    `tail` are (place in the assembly's blocks, or None for what derc adds, module). The last block, at place `last`,
    ends before the last unit where that is the head.
    """

    tail: list[tuple[int | None, nn.Module]]
    head: nn.Module | None
    last: int = 0
    buffers: dict[int, dict[str, Array]] = field(default_factory=dict)

    @property
    def added(self) -> list[nn.Module]:
        return [module for place, module in self.tail if place is None]

    @property
    def blocks(self) -> list[nn.Module]:
        return [module for place, module in self.tail if place is not None] + ([self.head] if self.head else [])

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs and features for what reaches the first stitch; both are the same without a head."""
        for _, module in self.tail:
            x = module(x.clone())
        return (self.head(x.clone()) if self.head is not None else x), x

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Copies of the weights of what derc adds."""
        return [{k: v.detach().clone() for k, v in module.state_dict().items()} for module in self.added]

    def restore(self, state: list[dict[str, torch.Tensor]]) -> None:
        for module, values in zip(self.added, state, strict=True):
            module.load_state_dict(values)

    def with_statistics(self, buffers: Mapping[int, dict[str, Array]]) -> Learner:
        """The same network, sharing what is trained, with copies of the blocks that get `buffers` by their place."""
        tail = [(p, m if p is None else _own(m, buffers.get(p, {}))) for p, m in self.tail]
        head = None if self.head is None else _own(self.head, buffers.get(self.last, {}))
        return replace(self, tail=tail, head=head, buffers={**self.buffers, **buffers})


@contextmanager
def frozen(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, no parameter of the modules asks for a gradient; afterwards each asks as before."""
    parameters = {p: p.requires_grad for module in modules for p in module.parameters()}
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, asked in parameters.items():
            parameter.requires_grad_(asked)


def learner(stitched: StitchedAssembly, lowered: Mapping[str, Lowered]) -> tuple[tuple[Step, ...], Learner]:
    """The steps in front of the first thing that derc adds, and the rest.

    Raises UsageError where there is nothing to train.
    """
    assembly, states, buffers = stitched.assembly.plain, list(stitched.states), dict(enumerate(stitched.buffers))
    front: list[Step] = []
    tail: list[tuple[int | None, nn.Module]] = []
    head, place = None, 0
    every = parts(assembly, lowered)
    for part in every:
        if not isinstance(part.spec, BlockRef):
            module = part.build().eval()
            module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in states.pop(0).items()})
            if part.kind != "head":
                tail.append((None, module))
            continue
        donor, block, own = lowered[part.spec.donor], part.spec, buffers.get(place, {})
        if assembly.head is None and place == len(assembly.blocks) - 1:
            head = _own(donor.block(len(donor.units) - 1, block.last), own)
            block = replace(block, last=len(donor.units) - 1)
        if block.first < block.last and not tail:
            front.append(fronts.block(donor, block))
        elif block.first < block.last:
            tail.append((place, _own(donor.block(block.first, block.last), own)))
        place += 1
    found = Learner(tail, head, len(assembly.blocks) - 1)
    if not any(p.requires_grad for module in found.added for p in module.parameters()):
        raise UsageError(f"{assembly} has no stitch with weights, so there is nothing to match")
    return tuple(front), found


def _own(module: nn.Module, buffers: Mapping[str, Array]) -> nn.Module:
    """The part of a block with those of the block's buffers that it has."""
    there = module.state_dict()
    return with_buffers(module, {name: value for name, value in buffers.items() if name in there}).eval()


def loss(lesson: Lesson, outputs: torch.Tensor, features: torch.Tensor, goal: Goal) -> torch.Tensor:
    """KL(teacher ‖ network) at TEMPERATURE, times its square, plus FEATURES × the features' unexplained variance.

    Where outputs cannot be compared it is that share alone.
    """
    missed = torch.zeros(()) if goal.features is None else unexplained(features, goal.features)
    if goal.outputs is None:
        return missed
    mine = (lesson.picked(outputs, learner=True) / TEMPERATURE).log_softmax(1)
    other = (lesson.picked(goal.outputs, learner=False) / TEMPERATURE).log_softmax(1)
    divergence = F.kl_div(mine, other, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return divergence + FEATURES * missed


def unexplained(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The squared difference as a share of the variance of what is wanted."""
    variance = (want - want.mean(0)).square().mean().clamp_min(1e-12)
    return (got - want).square().mean() / variance


@torch.no_grad()
def agreement(network: Learner, lesson: Lesson, split: Split) -> tuple[float, float]:
    """How far the network agrees with its teacher on a split, in [0, 1], and minus its loss there, to break ties.

    It is the share of equal answers, or of the features' variance explained where answers cannot be compared.
    """
    every = torch.arange(len(split))
    goals = [lesson.goal(split, part) for part in chunks(every)]
    found = [network(lesson.inputs(split, part)) for part in chunks(every)]
    outputs, features = torch.cat([o for o, _ in found]), torch.cat([f for _, f in found])
    wanted = None if goals[0].features is None else torch.cat([g.features for g in goals if g.features is not None])
    if goals[0].outputs is None:
        assert wanted is not None
        share = float(unexplained(features, wanted).nan_to_num(1.0, 1.0, 1.0))
        return max(0.0, 1 - share), -share
    answers = torch.cat([g.outputs for g in goals if g.outputs is not None])
    total = float(loss(lesson, outputs, features, Goal(answers, wanted)))
    mine, other = lesson.picked(outputs, learner=True), lesson.picked(answers, learner=False)
    if not torch.isfinite(mine).all():
        return 0.0, -float("inf")
    return float((mine.argmax(1) == other.argmax(1)).float().mean()), -total
