"""The training of stitches by gradient: AdamW with warm-up and cosine decay, the state that agrees best is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from derc.amounts import Amount
from derc.artifacts import Array
from derc.batchnorm import reestimated
from derc.data import Split
from derc.matching import Learner, Lesson, agreement, frozen, loss
from derc.recall import chunks

RATE = 0.05
"""Learning rate of a matrix or vector, as a share of its own root mean square at the start."""
LEAST_SCALE = 0.01
"""Root mean square that a vector or matrix of zeros is taken to have."""
WARM_UP = 0.05
"""Share of the training in which the learning rate grows."""
CHECKS = 6
"""How often agreement on the validation images is looked at."""
PATIENCE = 3
"""After so many looks in a row without a better state training ends."""
STATISTICS = 512
"""Images at most that batch norms are estimated anew on."""
LEAST_STATISTICS = 16
BATCH = 32


@dataclass
class Trained:
    """What training came to: `network` is in its best state, `note` says what went otherwise than asked."""

    network: Learner
    before: float
    after: float
    images: int
    note: str = ""


@dataclass
class Training:
    """One network on its way; `best` is the state with the best agreement so far."""

    network: Learner
    lesson: Lesson
    train: Split
    validation: Split
    amount: Amount
    seed: int = 0
    say: Callable[[str], None] = lambda _: None
    batch: int = BATCH
    shown: int = 0
    started: float = 0.0
    note: str = ""
    best: tuple[float, float] = (0.0, 0.0)
    state: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def run(self) -> Trained:
        """Train as long as asked; the network ends in the state of best agreement, at worst in the one it began in."""
        with frozen([*self.network.blocks]):
            self.best = agreement(self.network, self.lesson, self.validation)
            first, self.state = self.best[0], self.network.state()
            self._try_statistics()
            self._train()
            self.network.restore(self.state)
            if self.shown:
                self._try_statistics()
        return Trained(self.network, first, self.best[0], self.shown, self.note)

    def _train(self) -> None:
        self.started = time.perf_counter()
        parameters = [p for module in self.network.added for p in module.parameters()]
        groups = [{"params": [p], "lr": _rate(p)} for p in parameters]
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        rates = [group["lr"] for group in optimiser.param_groups]
        seen, vain = 0, 0
        for numbers in self._batches():
            progress = self._progress
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(progress)
            if not self._step(optimiser, numbers):
                return
            self.shown += len(numbers)
            if self._progress * CHECKS >= seen + 1:
                seen = int(self._progress * CHECKS)
                vain = 0 if self._check() else vain + 1
                if vain == PATIENCE:
                    return

    @property
    def _progress(self) -> float:
        """The share of the training that is done."""
        if self.amount.images:
            return min(1.0, self.shown / self.amount.images)
        return min(1.0, (time.perf_counter() - self.started) / self.amount.seconds)

    def _batches(self) -> Iterator[torch.Tensor]:
        """Numbers of images: all in order, then in random orders, until the amount is reached."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.arange(len(self.train))
        while True:
            place = 0
            while place < len(order):
                left = self.amount.images - self.shown if self.amount.images else self.batch
                if self._progress >= 1.0 or left <= 0:
                    return
                numbers = order[place : place + min(self.batch, left)]
                place += len(numbers)
                yield numbers
            order = torch.randperm(len(self.train), generator=generator)

    def _step(self, optimiser: torch.optim.Optimizer, numbers: torch.Tensor) -> bool:
        """One update; where memory does not suffice, in halves. False where the loss or a weight is not finite."""
        optimiser.zero_grad()
        try:
            total = self._backward(numbers)
        except (MemoryError, RuntimeError) as error:
            if not _is_memory(error) or len(numbers) == 1:
                raise
            self.batch = max(1, len(numbers) // 2)
            self.say(f"memory does not suffice for {len(numbers)} images at once: matching goes on with {self.batch}")
            self.note = f"batches of {self.batch} for want of memory"
            optimiser.zero_grad()
            return self._step(optimiser, numbers[: self.batch]) and self._rest(optimiser, numbers[self.batch :])
        if not math.isfinite(total):
            self.note = f"after {self.shown} images the loss was not finite; the best state before was kept"
            self.say(self.note)
            return False
        optimiser.step()
        return True

    def _rest(self, optimiser: torch.optim.Optimizer, numbers: torch.Tensor) -> bool:
        """Updates for what is left of a batch that did not fit; True where nothing is."""
        first, others = numbers[: self.batch], numbers[self.batch :]
        return len(first) == 0 or (self._step(optimiser, first) and self._rest(optimiser, others))

    def _backward(self, numbers: torch.Tensor) -> float:
        outputs, features = self.network(self.lesson.inputs(self.train, numbers))
        total = loss(self.lesson, outputs, features, self.lesson.goal(self.train, numbers))
        if not total.requires_grad:
            raise RuntimeError("no gradient reaches the stitches")
        torch.autograd.backward(total)
        return float(total.detach())

    def _check(self) -> bool:
        """Whether the network now agrees better than ever; then its state is kept."""
        found = agreement(self.network, self.lesson, self.validation)
        if found <= self.best:
            return False
        self.best, self.state = found, self.network.state()
        return True

    def _try_statistics(self) -> None:
        """Estimate the batch norms of the blocks anew, kept where agreement grows."""
        count = min(STATISTICS, len(self.train))
        if count < LEAST_STATISTICS:
            return
        inputs = (self.lesson.inputs(self.train, part) for part in chunks(torch.arange(count)))
        network = self.network
        rows = [*network.tail, *([(network.last, network.head)] if network.head is not None else [])]
        known = [place is not None for place, _ in rows]
        found = reestimated([module for _, module in rows], [x for x in inputs if len(x) > 1], known)
        buffers: dict[int, dict[str, Array]] = {}
        for (place, _), one in zip(rows, found, strict=True):
            if place is not None:
                buffers[place] = buffers.get(place, {}) | one
        if not any(buffers.values()):
            return
        other = self.network.with_statistics({place: one for place, one in buffers.items() if one})
        score = agreement(other, self.lesson, self.validation)
        if score[0] > self.best[0]:
            self.network, self.best = other, score


def _rate(parameter: torch.Tensor) -> float:
    scale = max(float(parameter.detach().square().mean().sqrt()), LEAST_SCALE)
    return scale * RATE


def _schedule(progress: float) -> float:
    return min((progress + 1e-3) / WARM_UP, 0.5 * (1 + math.cos(math.pi * progress)))


def _is_memory(error: BaseException) -> bool:
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
