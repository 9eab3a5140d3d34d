"""Images to train on, to choose the best state by, and to report on: three parts that share none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from derc.artifacts import Array
from derc.data import LARGEST_SPLIT, split_indices
from derc.errors import UsageError, suggest
from derc.images import Size, Source, array_source, folder_source, read_npz, resize
from derc.training.examples import Examples, InMemory

PROBES = 512
"""As many images a compile takes for its probes unless told otherwise."""
LEAST = 16
TESTS = ("test", "val", "valid", "validation")
CHOSEN_BY = ("val", "valid", "validation")
"""Names of parts: what is reported on, and, where there is a test part besides, what the best state is chosen by."""


@dataclass(frozen=True)
class TrainingData:
    """A labelled data set; `classes` are the class names in label order. Only the report may read `heldout`."""

    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    heldout: Examples

    def digest(self) -> str:
        """SHA-256 of the classes, and of each part's size, labels and, where they are in memory, images."""
        state = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.train, self.validation, self.heldout):
            state.update(part.labels.tobytes())
            if isinstance(part, InMemory):
                state.update(part.images.tobytes())
        return state.hexdigest()


class Read:
    """A source's labelled images, which `opening` opens again in every process that reads them."""

    def __init__(self, opening: Callable[[], Source]) -> None:
        self.opening = opening
        if self.source.labels is None:
            raise UsageError("the images have no labels, and training needs them: give one folder per class, or y")

    @cached_property
    def source(self) -> Source:
        return self.opening()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes or ()

    @property
    def labels(self) -> Array:
        if self.source.labels is None:
            raise UsageError("the images have no labels")
        return self.source.labels

    def __len__(self) -> int:
        return self.source.count

    def read(self, indices: Array) -> Array:
        return self.source.read(indices)

    def __getstate__(self) -> dict[str, Any]:
        return {"opening": self.opening}


@dataclass(frozen=True)
class Subset:
    """Some of a data set's images, by number."""

    examples: Examples
    indices: Array

    @cached_property
    def labels(self) -> Array:
        found: Array = self.examples.labels[self.indices].astype(np.int64)
        return found

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Array) -> Array:
        return self.examples.read(self.indices[indices])


def load(spec: str, size: Size, seed: int = 0) -> TrainingData:
    """The labelled images of `digits`, ``folder:PATH``, ``npz:PATH`` or ``hf:PATH`` at `size` (C, H, W).

    Raises UsageError for what cannot be read, has no labels, or is too small to be split.
    """
    if spec == "digits":
        return digits(size)
    kind, _, path = spec.partition(":")
    opening = {"folder": _folder, "npz": _npz, "hf": _hf}.get(kind)
    if opening is None or not path:
        hint = suggest(kind, ("digits", "folder", "npz", "hf"))
        raise UsageError(f"unknown data {spec!r}: give digits, folder:PATH, npz:PATH or hf:PATH{hint}")
    parts = opening(Path(path).expanduser(), size)
    classes = _classes(parts, spec)
    return TrainingData(spec, classes, *_divided({name: one for name, (one, _) in parts.items()}, spec, seed))


Parts = dict[str, tuple[Examples, tuple[str, ...]]]
"""What a data set is given in, by name ("" for one that is whole), with the classes of each."""


def digits(size: Size) -> TrainingData:
    """The embedded digits: trained on are the splits `train` and `probe`."""
    from derc.digits import CLASSES, load_split

    made = {name: load_split(name) for name in ("train", "probe", "validation", "heldout")}
    arrays = {name: InMemory(resize(images, size), labels) for name, (images, labels) in made.items()}
    first, second = arrays["train"], arrays["probe"]
    both = InMemory(np.concatenate([first.images, second.images]), np.concatenate([first.labels, second.labels]))
    return TrainingData("digits", CLASSES, both, arrays["validation"], arrays["heldout"])


def _plain(items: Any, _label: str, _total: int) -> Any:
    return items


def _folder(path: Path, size: Size) -> Parts:
    names = [name for name in ("train", *TESTS) if (path / name).is_dir()]
    if "train" not in names or len(names) == 1:
        names = [""]
    return {name: _read(partial(folder_source, path / name, size, _plain)) for name in names}


def _npz(path: Path, size: Size) -> Parts:
    arrays = read_npz(path)
    names = ["train", "test"] if "x_train" in arrays else [""]
    return {name: _read(partial(array_source, arrays, path, size, f"_{name}" if name else "")) for name in names}


def _read(opening: Callable[[], Source]) -> tuple[Read, tuple[str, ...]]:
    made = Read(opening)
    return made, made.classes


def _hf(path: Path, size: Size) -> Parts:
    from derc.hfdata import Rows, open_parts

    found = {name: Rows(part, path, size) for name, part in open_parts(path).items()}
    names = [name for name in ("train", *TESTS) if name in found]
    chosen = {name: found[name] for name in names} if "train" in names and len(names) > 1 else found
    if len(chosen) > 1 and "train" not in chosen:
        raise UsageError(f"{path} has the splits {', '.join(chosen)}, and none is called train: rename one")
    if "train" not in names or len(names) == 1:
        chosen = {"": found.get("train", next(iter(found.values())))}
    for one in chosen.values():
        _ = one.labels  # a set without any is refused here
    return {name: (one, one.classes or ()) for name, one in chosen.items()}


def _classes(parts: Parts, spec: str) -> tuple[str, ...]:
    """The classes that all parts share; raises UsageError, naming both, where they differ."""
    every = {name: classes for name, (_, classes) in parts.items()}
    if all(classes == tuple(map(str, range(len(classes)))) for classes in every.values()):
        return max(every.values(), key=len)
    known = every.get("train", next(iter(every.values())))
    for name, classes in every.items():
        if classes != known:
            raise UsageError(f"{spec}: its part {name} has the classes {some(classes)}, and train has {some(known)}")
    return known


def some(names: tuple[str, ...]) -> str:
    """The first names, and how many there are."""
    return f"{', '.join(names[:5])}, … ({len(names)})" if len(names) > 6 else ", ".join(names)


def _divided(parts: dict[str, Examples], spec: str, seed: int) -> tuple[Examples, Examples, Examples]:
    """Training, validation and held-out images.

    Where the data set is whole, held-out ones are those of a compile with the same seed, validation ones are a tenth,
    of those that it chooses by. Else a part of its own is held out, and a tenth of the training part is validation,
    unless there is a part for that too.
    """
    for name, part in parts.items():
        if len(part) < LEAST:
            raise UsageError(f"{spec} has {len(part)} images{f' to {name}' * bool(name)}, at least {LEAST} are needed")
    if "" in parts:
        whole = parts[""]
        _, second, third = split_indices(whole.labels, len(whole), PROBES, seed)
        second = second[: max(len(whole) // 10, LEAST // 4)]
        return _rest(whole, second, third), Subset(whole, second), Subset(whole, third)
    train, tests = parts["train"], [name for name in TESTS if name in parts]
    choosing = [name for name in CHOSEN_BY if name in parts and name != tests[0]]
    heldout = parts[tests[0]]
    if choosing:
        return train, parts[choosing[0]], heldout
    share, _, _ = split_indices(train.labels, len(train), min(LARGEST_SPLIT, max(len(train) // 10, LEAST // 4)), seed)
    return _rest(train, share), Subset(train, share), heldout


def _rest(examples: Examples, *taken: Array) -> Subset:
    """What is not taken."""
    return Subset(examples, np.setdiff1d(np.arange(len(examples)), np.concatenate(taken)))
