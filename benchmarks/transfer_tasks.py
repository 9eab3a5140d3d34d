"""Tasks whose labels no donor knows: donors, images of a seed, and how much of everything.

`halves`: networks that are trained here on one half of CIFAR-10's classes each answer all ten, on images that none of
them saw. `digits`: public CIFAR-10 networks read digits. `sideways`: the embedded digits networks say whether a digit
that lies on its side is low or high; none of them was trained on a validation or held-out image. Held-out images of
CIFAR-10 are from `x_test`, all others from `x_train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import cifarzoo
from benchmarks.accuracy_zoo import RECIPES, Images, Size, own_donor
from derc.artifacts import Array
from derc.data import Data, Split
from derc.digits import indices, load_all
from derc.images import resize
from derc.zoo import Zoo

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HALVES = {"first": cifarzoo.CLASSES[:5], "second": cifarzoo.CLASSES[5:]}
HALF_DONORS = tuple(f"{name}_{half}" for half in HALVES for name in RECIPES)


@dataclass(frozen=True)
class Task:
    """A zoo, the images of a seed, sizes, and budgets as quantiles of the donors' multiply-accumulates."""

    name: str
    zoo: Zoo
    data: Callable[[int], Data]
    size: Size
    quantiles: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class Plan:
    """How much of a task is done; `donors` are all that there are where none is named."""

    size: Size
    quantiles: tuple[float, ...]
    seeds: int


PUBLIC = ("ai85_nascifarnet", "akamaster_resnet20", "mlperftiny_resnet8", "tiniest", "vainf_resnet56_pruned")
"""One CIFAR-10 network of each of five teams."""
LITTLE = Size((), probe=128, train=256, validation=200, heldout=300, evaluations=4, matched=1, swaps=4, epochs=2)
SCANS = Size((), probe=300, train=600, validation=300, heldout=597, evaluations=12, matched=1, swaps=12, epochs=5)
"""Sizes of the tasks with digits, of which there are 1797."""
FULL = {
    "halves": Plan(
        Size(HALF_DONORS, train=768, evaluations=12, matched=1, swaps=12, own_epochs=10, epochs=2), (0.2, 0.5, 0.8), 2
    ),
    "digits": Plan(replace(SCANS, donors=PUBLIC, epochs=2), (0.1, 0.4, 0.7), 2),
    "sideways": Plan(SCANS, (0.25, 0.5, 0.75, 1.0), 2),
}
QUICK = {
    "halves": Plan(
        replace(LITTLE, donors=("own_mobilenet_first", "own_mixer_second", "own_vit_first"), own_epochs=2), (0.6,), 1
    ),
    "digits": Plan(replace(LITTLE, donors=("mlperftiny_resnet8", "ai85_nascifarnet")), (1.0,), 1),
    "sideways": Plan(replace(LITTLE, donors=("convnext", "effnet", "regnet-parity", "vit-patch8")), (0.6,), 1),
}


def tasks(shared: Path | None, folder: Path, plans: dict[str, Plan]) -> list[Task]:
    """What `plans` names and can be asked with the data at hand; donors are trained where `folder` has none."""
    found, donors = [], folder / "donors"
    donors.mkdir(parents=True, exist_ok=True)
    if shared is not None and "halves" in plans:
        size, images = plans["halves"].size, Images.load(shared)
        found.append(task("halves", halves(donors, size, images), lambda _: partial(images.drawn, size), plans))
    if shared is not None and "digits" in plans:
        public = cifarzoo.load_zoo(shared / "zoo", donors)
        found.append(task("digits", public, partial(digits, digit_images(), NAMES), plans))
    if "sideways" in plans:
        images_sideways = np.ascontiguousarray(np.rot90(digit_images(), axes=(1, 2)))
        embedded = Zoo.load("digits", check=lambda _: None)
        found.append(task("sideways", embedded, partial(digits, images_sideways, ("low", "high")), plans))
    return found


def task(name: str, zoo: Zoo, data: Callable[[Size], Callable[[int], Data]], plans: dict[str, Plan]) -> Task:
    """The task with those of the zoo's donors that its plan names, all where it names none."""
    plan = plans[name]
    wanted = plan.size.donors or zoo.names
    chosen = replace(zoo, donors=tuple(one for one in zoo.donors if one.name in wanted))
    return Task(name, chosen, data(plan.size), plan.size, plan.quantiles, plan.seeds)


def halves(folder: Path, size: Size, images: Images) -> Zoo:
    """Networks that know one half of the classes each."""
    found = []
    for name in size.donors:
        recipe, half = name.rsplit("_", 1)
        classes = HALVES[half]
        first = cifarzoo.CLASSES.index(classes[0])
        train, validation = (only(split, first, len(classes)) for split in images.own())
        found.append(own_donor(name, RECIPES[recipe], folder, size.own_epochs, (train, validation), classes))
    return Zoo("halves", tuple(found))


def only(split: Split, first: int, count: int) -> Split:
    """The images of `count` classes, numbered from 0."""
    assert split.labels is not None
    chosen = (split.labels >= first) & (split.labels < first + count)
    return Split(split.images[chosen], split.labels[chosen] - first)


def digit_images() -> Array:
    """All scans as images (1797, 32, 32, 3)."""
    return resize(load_all()[0], (3, 32, 32))


def digits(images: Array, classes: tuple[str, ...], size: Size) -> Callable[[int], Data]:
    """A seed's splits of the scans, in as many classes as there are names, each of as many digits in a row.

    Probes and training images are those that the embedded networks were trained on, the others were never seen.
    """
    labels = load_all()[1] * len(classes) // 10

    def drawn(seed: int) -> Data:
        chance = np.random.default_rng(seed)
        known = chance.permutation(indices("train"))
        new = chance.permutation(np.concatenate([indices(name) for name in ("probe", "validation", "heldout")]))
        probe, train = (Split(images[part], labels[part]) for part in np.split(known, [size.probe]))
        ends = [size.validation, size.validation + size.heldout]
        validation, heldout = (Split(images[part], labels[part]) for part in np.split(new, ends)[:2])
        return Data(f"seed{seed}", classes, probe, validation, heldout, train.first(size.train).first)

    return drawn
