"""Images in three disjoint splits: probe says what values mean, validation what to choose, held-out what to report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from derc import artifacts
from derc.artifacts import Array
from derc.errors import UsageError, suggest
from derc.images import Source, Track, digits_splits, folder_source, npz_source, resize

if TYPE_CHECKING:
    from torch import Tensor

    from derc.zoo import Zoo

LEAST_PROBES = 8
LARGEST_SPLIT = 2000


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 with labels (N,) int64, or None where there are none."""

    images: Array
    labels: Array | None

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images and labels."""
        return artifacts.digest(self.images.tobytes(), list(self.images.shape), self._label_list())

    def _label_list(self) -> list[int] | None:
        return None if self.labels is None else [int(label) for label in self.labels]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """In order, `size` at a time, the last batch maybe fewer: images (n, C, H, W) float32 in [0, 1], and labels."""
        import torch

        for start in range(0, len(self), size):
            labels = None if self.labels is None else torch.from_numpy(self.labels[start : start + size])
            yield _pixels(self.images[start : start + size]), labels

    def first(self, count: int) -> Split:
        """At most `count` images, from the beginning."""
        return Split(self.images[:count], None if self.labels is None else self.labels[:count])

    def take(self, numbers: Tensor) -> Tensor:
        """The images of these numbers: (n, C, H, W) float32 in [0, 1]."""
        return _pixels(self.images[numbers.numpy()])


def _pixels(images: Array) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255


@dataclass(frozen=True)
class Data:
    """A data set; `classes` are the class names in label order, None without labels.

    Only the final report may read `heldout`. `more` reads up to so many images beyond the three splits, None where the
    data set has no others.
    """

    name: str
    classes: tuple[str, ...] | None
    probe: Split
    validation: Split
    heldout: Split
    more: Callable[[int], Split] | None = field(default=None, compare=False, repr=False)
    _trainings: dict[int, Split] = field(default_factory=dict, init=False, compare=False, repr=False)

    def training(self, count: int) -> Split:
        """At most `count` images to train on: the probes, then those beyond the splits, which are read now."""
        if count not in self._trainings:
            wanted = count - len(self.probe)
            more = self.more(wanted) if wanted > 0 and self.more else None
            self._trainings[count] = _joined(self.probe, more) if more else self.probe.first(count)
        return self._trainings[count]

    def digest(self) -> str:
        """SHA-256 of what a compile may depend on: classes, probe and validation."""
        return artifacts.digest(list(self.classes or ()), self.probe.digest, self.validation.digest)

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        input_size: tuple[int, int, int] = (3, 32, 32),
        probe: int = 512,
        seed: int = 0,
        track: Track = lambda items, _label, _total: items,
    ) -> Data:
        """The data set `digits`, ``folder:``, ``npz:`` or ``hf:PATH`` as images of `input_size` (C, H, W).

        At most `probe` probe images, `LARGEST_SPLIT` others per split; `seed` shuffles all but digits, whose splits
        are fixed. Raises UsageError for what cannot be read and for fewer than 8 probe images.
        """
        if probe < LEAST_PROBES:
            raise UsageError(f"--probe {probe} is too few: at least {LEAST_PROBES} probe images are needed")
        if input_size[0] not in (1, 3):
            raise UsageError(f"images have 1 or 3 channels, and the networks want {input_size[0]}")
        if spec == "digits":
            classes, parts = digits_splits()
            splits = [Split(resize(images, input_size), labels) for images, labels in parts]
            return cls("digits", classes, splits[0].first(probe), splits[1], splits[2], _digits_left(input_size))
        source = _source(spec, input_size, track)
        *shares, rest = _shares(source.labels, source.count, probe, seed)
        if len(shares[0]) < LEAST_PROBES:
            raise UsageError(f"{spec} has {source.count} images, at least {2 * LEAST_PROBES} are needed to split them")
        more = (lambda count: _read(source, rest[:count])) if len(rest) else None
        first, second, third = (_read(source, share) for share in shares)
        return cls(spec, source.classes, first, second, third, more)

    def task_donors(self, zoo: Zoo) -> tuple[str, ...]:
        """Names of the donors whose head answers this data set's question.

        With labels: those that `label_map` fits. Without: those that share the zoo's most common labels (of equally
        common ones the first donor's), or the first donor where no labels are known.
        """
        if self.classes is not None:
            return tuple(d.name for d in zoo.donors if label_map(d.labels, self.classes) is not None)
        counts = Counter(donor.labels for donor in zoo.donors if donor.labels is not None)
        if not counts:
            return zoo.names[:1]
        common = max(counts, key=lambda labels: counts[labels])
        return tuple(donor.name for donor in zoo.donors if donor.labels == common)


def label_map(donor_labels: tuple[str, ...] | None, classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """For each class of a data set the donor's output that stands for it, or None where the head does not fit.

    By name where the donor has every class (case, spaces and underscores aside). Else by index where the counts are
    equal and one side has no real names, only "0", "1", …; two sets of real names that differ never fit.
    """
    if donor_labels is None:
        return None
    place = {_plain(label): index for index, label in enumerate(donor_labels)}
    if all(_plain(name) in place for name in classes):
        return tuple(place[_plain(name)] for name in classes)
    if len(classes) == len(donor_labels) and (_unnamed(classes) or _unnamed(donor_labels)):
        return tuple(range(len(classes)))
    return None


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _unnamed(names: tuple[str, ...]) -> bool:
    return names == tuple(str(index) for index in range(len(names)))


def split_indices(labels: Array | None, count: int, probe: int, seed: int) -> tuple[Array, Array, Array]:
    """Disjoint indices of probe, validation and held-out images, each with the classes in even shares.

    Probe gets min(probe, count // 2); the other two halve the rest, at most LARGEST_SPLIT each.
    """
    first, second, third, _ = _shares(labels, count, probe, seed)
    return first, second, third


def rest_indices(labels: Array | None, count: int, probe: int, seed: int) -> Array:
    """The images that `split_indices` leaves over, in an order that keeps the classes' shares."""
    return _shares(labels, count, probe, seed)[-1]


def _shares(labels: Array | None, count: int, probe: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """What `split_indices` gives, and what it leaves over."""
    order = _interleaved(labels, count, np.random.default_rng(seed))
    first = min(probe, count // 2)
    half, limit = (count - first) // 2, LARGEST_SPLIT
    second, third = order[first : first + half], order[first + half :]
    return order[:first], second[:limit], third[:limit], np.concatenate([second[limit:], third[limit:]])


def _interleaved(labels: Array | None, count: int, rng: np.random.Generator) -> Array:
    """A shuffled order whose every run of images has the classes in about the data set's shares."""
    order = rng.permutation(count)
    if labels is None:
        return order
    place = np.empty(count)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    found: Array = np.argsort(place, kind="stable")
    return found


def _joined(one: Split, other: Split) -> Split:
    labels = None if one.labels is None or other.labels is None else np.concatenate([one.labels, other.labels])
    return Split(np.concatenate([one.images, other.images]), labels)


def _read(source: Source, indices: Array) -> Split:
    return Split(source.read(indices), None if source.labels is None else source.labels[indices])


def _digits_left(size: tuple[int, int, int]) -> Callable[[int], Split]:
    """The training split of the embedded digits, which no other split shares images with."""

    def read(count: int) -> Split:
        from derc.digits import load_split

        images, labels = load_split("train")
        return Split(resize(images[:count], size), labels[:count])

    return read


def _source(spec: str, input_size: tuple[int, int, int], track: Track) -> Source:
    kind, separator, path = spec.partition(":")
    if separator and path and kind == "folder":
        return folder_source(Path(path).expanduser(), input_size, track)
    if separator and path and kind == "npz":
        return npz_source(Path(path).expanduser(), input_size)
    if separator and path and kind == "hf":
        from derc.hfdata import hf_source

        return hf_source(Path(path).expanduser(), input_size)
    hint = suggest(kind, ("digits", "folder", "npz", "hf"))
    raise UsageError(f"unknown data {spec!r}: give digits, folder:PATH, npz:PATH or hf:PATH{hint}")
