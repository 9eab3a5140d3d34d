"""Labelled images that are read on demand, and their batches in an order that the seed and the step alone decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from derc.artifacts import Array
from derc.data import Split
from derc.errors import UsageError
from derc.training.augment import Augmentation


class Examples(Protocol):
    """Images with labels (N,) int64; `read` takes indices and gives (n, H, W, C) uint8."""

    @property
    def labels(self) -> Array: ...

    def __len__(self) -> int: ...

    def read(self, indices: Array) -> Array: ...


@dataclass(frozen=True)
class InMemory:
    """Images (N, H, W, C) uint8 and labels (N,) that are there."""

    images: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Array) -> Array:
        found: Array = self.images[indices]
        return found


def as_examples(images: Split | Examples) -> Examples:
    """A split as examples; raises UsageError where it has no labels."""
    if not isinstance(images, Split):
        return images
    if images.labels is None:
        raise UsageError("the images have no labels, and training needs them: give one folder per class, or y")
    return InMemory(images.images, images.labels)


@dataclass(frozen=True)
class Share:
    """This process's part of every batch: each `world`th image from the `rank`th on."""

    rank: int = 0
    world: int = 1


@dataclass
class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batch of every step: shuffled anew each epoch, the last incomplete batch of an epoch left out.

    A batch holds all images where there are fewer than `size`. What a step gets depends on seed and step alone, so that
    a training may go on from any step, with any number of workers.
    """

    examples: Examples
    size: int
    seed: int
    augmentation: Augmentation
    even: bool = False
    share: Share = Share()
    _order: tuple[int, Array] = field(default=(-1, np.zeros(0, np.int64)), repr=False)

    def __post_init__(self) -> None:
        self.size = min(self.size, len(self.examples))
        if self.even:
            self.size -= self.size % 2

    @property
    def per_epoch(self) -> int:
        return len(self.examples) // self.size

    def chosen(self, step: int) -> Array:
        """The images of a step, by number."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return self._order[1][place * self.size : (place + 1) * self.size]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of the step's batch: images (n, C, H, W) float32 in [0, 1], and labels."""
        indices = self.chosen(step)[self.share.rank :: self.share.world]
        rng = np.random.default_rng([self.seed, 1, step, self.share.rank])
        images = self.augmentation(self.examples.read(indices), rng)
        return scaled(images), torch.from_numpy(self.examples.labels[indices])

    def stream(self, start: int, stop: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the steps from `start` to `stop`, read by `workers` processes, or here where 0."""
        loader: DataLoader[Any] = DataLoader(
            self, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=torch.cuda.is_available()
        )
        return iter(loader)


def in_order(examples: Examples, size: int, share: Share = Share()) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, `size` at a time, of which this process gets every `world`th batch."""
    for start in range(share.rank * size, len(examples), share.world * size):
        indices = np.arange(start, min(start + size, len(examples)))
        yield scaled(examples.read(indices)), torch.from_numpy(examples.labels[indices])


def scaled(images: Array) -> Tensor:
    """(n, H, W, C) uint8 as (n, C, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
