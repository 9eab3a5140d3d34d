from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from derc import digits
from derc.data import Data
from derc.digits.recipes import RECIPES
from derc.digits.train import accuracy_on, augment, examples, train
from derc.zoo import Zoo

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo.load("digits")


def card(name: str) -> dict:
    return json.loads((digits.FOLDER / f"{name}.json").read_text())


def test_the_images_are_scikit_learns():
    images, labels = digits.load_all()
    truth = load_digits()
    assert np.array_equal(images[..., 0], np.round(truth.images * 255 / 16).astype(np.uint8))
    assert np.array_equal(labels, truth.target)


def test_the_splits_are_disjoint_cover_and_balanced():
    parts = [digits.indices(name) for name in digits.SIZES]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    whole = np.bincount(digits.load_all()[1])
    for name, size in digits.SIZES.items():
        counts = np.bincount(digits.load_split(name)[1], minlength=10)
        assert abs(counts - whole * size / 1797).max() <= 2, name


def test_the_splits_are_fixed():
    state = hashlib.sha256(b"".join(digits.indices(name).astype("<i8").tobytes() for name in digits.SIZES))
    assert state.hexdigest() == "4fd3332b56fee7ac20e0b725d992ff3a02023c8abcbe39dadcd585663741d7f0"


def test_the_zoo_is_small_and_varied(zoo):
    assert zoo.names == tuple(donor.name for donor in zoo.donors) and set(zoo.names) == set(RECIPES)
    assert len({donor.factory for donor in zoo.donors}) >= 5
    assert len({donor.mean for donor in zoo.donors}) >= 3
    assert sum(file.stat().st_size for file in digits.FOLDER.glob("*.safetensors")) <= 6e6
    assert len(Data.load("digits").task_donors(zoo)) >= 5
    assert len({donor.labels for donor in zoo.donors}) >= 3


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_card_tells_what_was_shipped(zoo, name):
    told = card(name)
    weights = digits.FOLDER / f"{name}.safetensors"
    assert told["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert told["recipe"] == json.loads(json.dumps(asdict(RECIPES[name])))
    assert told["command"] == f"python -m derc.digits.train --only {name}"
    assert (told["licence"], told["classes"]) == (zoo[name].licence, list(zoo[name].labels))
    network = zoo[name].build()
    assert told["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    accuracy, count = accuracy_on("heldout", zoo[name], network, told["task"])
    assert count == told["heldout"]["images"]
    assert accuracy == pytest.approx(told["heldout"]["accuracy"], abs=1.5 / count)
    assert f"{told['heldout']['accuracy']:.2%}" in (digits.FOLDER / "CARDS.md").read_text()


def test_tasks():
    images, labels = examples("digits", "validation")
    _, parity = examples("parity", "validation")
    turned, turns = examples("rotation", "validation", (0, 5))
    assert images.shape == (300, 3, 32, 32) and torch.equal(parity, labels % 2)
    assert turns.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert torch.equal(turned[5:10].rot90(-1, (2, 3)), images[:5])


def test_without_limits_augmentation_changes_nothing():
    images, _ = examples("digits", "validation", (0, 4))
    assert torch.allclose(augment(images, RECIPES["resnet-slim"]), images, atol=1e-5)


def test_training_is_the_same_each_time(zoo):
    from dataclasses import replace

    recipe = replace(RECIPES["effnet"], epochs=1, images=(0, 25), mixup=0.2)
    first, second = (train(zoo["effnet"], recipe, None).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
