"""Which images the accuracy benchmark shows to whom."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy_zoo import ANALYSIS, OWN, Images, Size
from derc.data import Data, Split

SIZE = Size((), probe=40, train=50, validation=30, heldout=60)
OTHERS = 200
"""Images of `x_train` that are left to seeds."""


@pytest.fixture(scope="module")
def images() -> Images:
    """Images of one pixel that says their number: those of `x_test` come after those of `x_train`."""
    count = ANALYSIS + OWN + OTHERS
    return Images(numbered(0, count), numbered(count, count + 150))


def numbered(first: int, last: int) -> Split:
    numbers = np.arange(first, last)
    pixels = np.stack([numbers // 256**k % 256 for k in range(3)], axis=-1).astype(np.uint8)
    return Split(pixels[:, None, None], numbers % 10)


def numbers(split: Split) -> set[int]:
    """The numbers of a split's images, each once, whose labels are their own."""
    found = split.images.reshape(-1, 3).astype(int) @ [1, 256, 256**2]
    assert split.labels is not None and (split.labels == found % 10).all()
    assert len(set(found)) == len(found)
    return set(found.tolist())


def splits(data: Data, count: int) -> list[set[int]]:
    assert data.more is not None
    return [numbers(one) for one in (data.probe, data.more(count), data.validation, data.heldout)]


@pytest.mark.parametrize("seed", range(3))
def test_what_trains_and_chooses_is_of_images_that_no_donor_was_trained_on(images: Images, seed: int) -> None:
    test = numbers(images.test)
    probe, train, validation, heldout = splits(images.unseen(SIZE, seed), SIZE.train)
    assert [len(one) for one in (probe, train, validation, heldout)] == [40, 50, 30, 60]
    assert train | validation | heldout <= test and not (train & validation or (train | validation) & heldout)
    assert min(probe) >= ANALYSIS + OWN and not probe & test


@pytest.mark.parametrize("seed", range(3))
def test_images_of_the_training_set_are_those_that_no_donor_of_the_benchmark_saw(images: Images, seed: int) -> None:
    probe, train, validation, heldout = splits(images.drawn(SIZE, seed), SIZE.train)
    assert len(probe | train | validation) == 120 and min(probe | train | validation) >= ANALYSIS + OWN
    assert heldout <= numbers(images.test)


def test_seeds_draw_other_images_and_hold_out_the_same(images: Images) -> None:
    one, other = (splits(images.unseen(SIZE, seed), SIZE.train) for seed in (0, 1))
    assert one[3] == other[3]
    assert all(a != b for a, b in zip(one[:3], other[:3], strict=True))


def test_another_size_has_another_folder() -> None:
    assert SIZE.name != Size((), probe=40, train=50, validation=30, heldout=60, frozen_lr=1e-3).name
