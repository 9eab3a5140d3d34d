"""Block-local distillation: each block, with the stitch in front of it, learns what its own donor gives there.

What goes in is what the intact donor of the block before gives where that block ends, so that no block waits for
another. Blocks that are taught one by one by a network's features are those of Li et al. 2020 (arXiv 1911.13053) and
Molchanov et al. 2022 (arXiv 2107.10624); here input and target may come from two donors. No label is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from derc.data import Split
from derc.errors import UsageError
from derc.lastlayer import tapped
from derc.training.checkpoint import Work
from derc.training.examples import Examples, as_examples, in_order, scaled
from derc.training.freeze import Trains, everything
from derc.training.options import TrainOptions
from derc.training.outcome import Row, Scored, Trained
from derc.training.trainer import Trainer

LIMIT = 512 * 2**20
"""Bytes of donors' values that may be kept for one block; more are computed anew for each batch."""
LEAST_VARIANCE = 1e-12
FITTED = 2048
"""Training images at most that stitches are fitted to in closed form."""
FIT_BATCH, LEAST_BATCHES = 32, 4
Fit = Callable[[nn.Module, Iterable[tuple[Tensor, Tensor]]], object]
"""Sets a stitch so that it gives the second of each pair of batches for the first."""


@dataclass(frozen=True)
class Lesson:
    """What the `parts` of a network, a stitch and the block behind it, are to give, and for which input.

    `given` and `wanted` take images (n, C, H, W) in [0, 1] and are what two intact donors, named in `donors`, give
    before the stitch and behind the block; `given` is None where the parts take the images. Where there is a `tap`, the
    path of the network's last layer, what goes into that is compared in place of what the parts give. `stitch` is the
    name of one that can be fitted in closed form, to what the block's own donor gives `behind` it.
    """

    block: str
    parts: tuple[str, ...]
    given: nn.Module | None
    wanted: nn.Module
    donors: tuple[str, str]
    tap: str | None = None
    stitch: str | None = None
    behind: nn.Module | None = None

    @torch.no_grad()
    def show(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target for these images; raises UsageError where a donor gives what is not finite."""
        found = images if self.given is None else self.given(images.clone()), self.wanted(images.clone())
        for value, donor in zip(found, self.donors, strict=True):
            if not torch.isfinite(value).all():
                raise UsageError(
                    f"donor {donor} gives values that are not finite, so {self.block} cannot be taught: give the zoo "
                    "that the bundle was made from with --zoo, or leave --blockwise out"
                )
        return found


def to_fit(examples: Examples) -> Iterator[Tensor]:
    """The images that a stitch is fitted to, (n, C, H, W) in [0, 1], in at least four batches."""
    count = min(FITTED, len(examples))
    for numbers in np.array_split(np.arange(count), max(LEAST_BATCHES, -(-count // FIT_BATCH))):
        yield scaled(examples.read(numbers))


class InputOf(nn.Module):
    """What goes into the `last` layer of a network, which is a part of it."""

    def __init__(self, network: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.last = (last,)  # a tuple, so that it is no second child

    def forward(self, x: Tensor) -> Tensor:
        return into(self.last[0], self.network, x)


def into(layer: nn.Module, network: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """What goes into `layer` when `network` runs on `x`, with its gradient; the layer's last call counts."""
    with tapped(layer) as inputs:
        network(x)
    return inputs[-1]


class Pupil(nn.Module):
    """The parts of a network that one lesson teaches, under the names that they have there."""

    def __init__(self, network: nn.Module, lesson: Lesson) -> None:
        super().__init__()
        for name in lesson.parts:
            self.add_module(name, network.get_submodule(name))
        self.tap = lesson.tap

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x) if self.tap is None else into(self.get_submodule(self.tap), self._run, x)

    def _run(self, x: Tensor) -> Tensor:
        x = x.clone()
        for part in self.children():
            x = part(x)
        return x


def teach(
    network: nn.Module,
    lesson: Lesson,
    images: Split | Examples,
    validation: Split | Examples,
    options: TrainOptions,
    *,
    trains: Trains = everything,
    fit: Fit | None = None,
    work: Work | None = None,
    say: Callable[[str], None] = lambda _: None,
    record: Callable[[Row], None] = lambda _: None,
) -> Trained:
    """Train the parts of `network` that the lesson names, in place, `options.epochs` times through the images.

    The loss is the share of the target's variance over the validation images that is missed: in `Trained`, `before`
    and `after` have it there, and the state of the least is kept, at worst the one that the parts came in. A stitch is
    first fitted by `fit`, where that is given and makes the loss less. Labels, and options that need them, are not
    read. Work folder, repeatability and errors are those of `train`; raises UsageError,
    too, where a donor's values are not finite or have another shape than the block's.
    """
    plain = replace(options, mixup=0.0, cutmix=0.0, smoothing=0.0, limit_s=None, allow_worse=False)
    pupil = Pupil(network, lesson)
    every = as_examples(images), as_examples(validation)
    return _Teaching(pupil, *every, plain, trains, None, None, work, say, record, lesson=lesson, fit=fit).run()


@dataclass
class _Teaching(Trainer):
    """A training in which images stand for what donors make of them."""

    rate: ClassVar[str] = "--blockwise-lr"
    lesson: Lesson = field(kw_only=True)
    fit: Fit | None = field(kw_only=True, default=None)

    def _check_images(self) -> None:
        for examples, what in ((self.examples, "training"), (self.validation, "validation")):
            if len(examples) == 0:
                raise UsageError(f"there are no {what} images: give more data")
        for module in (self.lesson.given, self.lesson.wanted, self.lesson.behind):
            if module is not None:
                module.to(self.runner.device).eval()

    @torch.no_grad()
    def _check_outputs(self) -> int:
        images, _ = next(in_order(self.examples, 1))
        given, wanted = self.lesson.show(images.to(self.runner.device))
        try:
            outputs = self.network.eval()(given)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and "memory" in str(error):
                raise
            raise self._other(f"it does not take what {self.lesson.donors[0]} gives") from error
        if outputs.shape != wanted.shape:
            raise self._other(f"it gives {tuple(outputs.shape[1:])}, its donor {tuple(wanted.shape[1:])}")
        return int(outputs.shape[1])

    def _other(self, what: str) -> UsageError:
        return UsageError(
            f"{self.lesson.block} is no block of these donors ({what}): give the zoo that the bundle was made from "
            "with --zoo"
        )

    def _resume(self) -> None:
        fresh = self.work is None or self.work.load() is None
        super()._resume()
        if fresh and self.fit is not None and self.lesson.stitch is not None and self.lesson.behind is not None:
            self._fit_stitch(self.fit, self.network.get_submodule(self.lesson.stitch), self.lesson.behind)

    @torch.no_grad()
    def _fit_stitch(self, fit: Fit, stitch: nn.Module, behind: nn.Module) -> None:
        """Begin with the stitch fitted in closed form where less is missed then."""
        before = {name: value.clone() for name, value in stitch.state_dict().items()}
        place = self.runner.device
        images = (one.to(place) for one in to_fit(self.examples))
        fit(stitch.cpu(), ((self.lesson.show(one)[0].cpu(), behind(one.clone()).cpu()) for one in images))
        stitch.to(place)
        self._challenge(self._score(self.network), self.network, "fit", 0)
        if self.kept != "fit":
            stitch.load_state_dict(before)

    @cached_property
    def _kept(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The donors' values for all images, by the identity of the images; empty where they are not needed twice."""
        every = (self.examples, self.validation)
        if self.options.augment or self._bytes() > LIMIT:
            return {}
        return {id(examples): self._remembered(examples) for examples in every}

    def _bytes(self) -> int:
        one = self._shown(next(in_order(self.validation, 1))[0])
        return sum(value.nbytes for value in one) * (len(self.examples) + len(self.validation))

    def _remembered(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Input and target for all images, in order, on the processor."""
        rooms: list[Tensor] = []
        place = 0
        for images, _ in in_order(examples, self.micro):
            for room, value in enumerate(self._shown(images)):
                if len(rooms) <= room:
                    rooms.append(torch.empty(len(examples), *value.shape[1:]))
                rooms[room][place : place + len(value)] = value.cpu()
            place += len(images)
        return rooms[0], rooms[1]

    def _shown(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.lesson.show(images.to(self.runner.device))

    @cached_property
    def _variance(self) -> float:
        """Of the target over the validation images: the mean over its elements of each one's own."""
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for _, wanted in self._pairs():
            value = wanted.double().cpu()
            count, total, square = count + len(value), total + value.sum(0), square + value.square().sum(0)
        return max(float((square / count - (total / count).square()).mean()), LEAST_VARIANCE)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Input and target for the validation images, in order."""
        size = min(self.micro, self.options.batch)
        if id(self.validation) in self._kept:
            given, wanted = self._kept[id(self.validation)]
            for one, other in zip(given.split(size), wanted.split(size), strict=True):
                yield one.to(self.runner.device), other.to(self.runner.device)
            return
        for images, _ in in_order(self.validation, size):
            yield self._shown(images)

    def _accumulated(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        sums = dict.fromkeys(self.sums, 0.0)
        numbers = torch.from_numpy(np.ascontiguousarray(self.batches.chosen(self.step)))
        for part, which in zip(images.split(self.micro), numbers.split(self.micro), strict=True):
            given, wanted = self._values(part, which)
            with self.runner.context():
                outputs = self.live(given)
            loss = (outputs.float() - wanted).square().mean() / self._variance
            self.runner.backward(loss * (len(part) / len(images)))
            sums["loss"] += float(loss.detach()) * len(part)
            sums["seen"] += len(part)
        return sums

    def _values(self, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        if id(self.examples) not in self._kept:
            return self._shown(images)
        given, wanted = self._kept[id(self.examples)]
        return given[numbers].to(self.runner.device), wanted[numbers].to(self.runner.device)

    def _scored(self, network: nn.Module) -> Scored:
        """The share of the target's variance that is missed, and the rest of it in place of an accuracy."""
        missed, elements = 0.0, 0
        for given, wanted in self._pairs():
            missed += float((network(given).float() - wanted).double().square().sum())
            elements += wanted.numel()
        share = missed / elements / self._variance
        return Scored(1 - share, share)
