"""What the transfer benchmark asks: splits that share nothing, labels, and which part of a network is no donor's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from benchmarks.accuracy_networks import Net
from benchmarks.transfer_tasks import FULL, digits, only
from benchmarks.transfer_world import million, random_head
from derc.artifacts import FittedHead
from derc.assembled import Assembled
from derc.data import Split
from derc.digits import indices, load_all

NUMBERS = np.arange(1797).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_splits_of_digits_share_nothing_and_what_chooses_or_reports_was_never_seen(seed: int) -> None:
    size = FULL["sideways"].size
    data = digits(NUMBERS, ("low", "high"), size)(seed)
    assert data.more is not None
    splits = [data.probe, data.more(10_000), data.validation, data.heldout]
    chosen = [set(split.images.ravel().tolist()) for split in splits]
    assert [len(one) for one in chosen] == [size.probe, size.train, size.validation, size.heldout]
    assert len(set.union(*chosen)) == sum(map(len, chosen))
    assert not (chosen[2] | chosen[3]) & set(indices("train").tolist())


def test_labels_are_as_many_digits_in_a_row_as_there_are_classes() -> None:
    size = replace(FULL["sideways"].size, heldout=300)
    for classes in (("low", "high"), tuple("abcdefghij")):
        heldout = digits(NUMBERS, classes, size)(0).heldout
        assert heldout.labels is not None
        wanted = load_all()[1][heldout.images.ravel()] // (10 // len(classes))
        np.testing.assert_array_equal(heldout.labels, wanted)


def test_a_half_has_its_own_classes_from_zero() -> None:
    labels = np.array([0, 5, 9, 4, 7])
    found = only(Split(NUMBERS[:5], labels), 5, 5)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 4, 2] and found.images.ravel().tolist() == [1, 2, 4]


def test_a_random_head_is_drawn_as_torch_draws_one() -> None:
    head = FittedHead("fc", np.ones((3, 400), np.float32), np.ones(3, np.float32), "ridge", 1.0, 10, 0.5)
    found = random_head(head, 0)
    assert (found.path, found.weight.shape, found.bias.shape) == ("fc", (3, 400), (3,))
    assert np.abs(found.weight).max() <= 1 / 20 and found.weight.std() == pytest.approx(0.05 / 3**0.5, rel=0.05)


def test_a_fitted_head_trains_where_blocks_are_frozen() -> None:
    network = Assembled([nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])
    net = Net(network, frozenset({1}), "parts.2.1")
    trained = [name for name, _ in network.named_parameters() if net.only_added(name)]
    assert trained == ["parts.1.weight", "parts.1.bias", "parts.2.1.weight", "parts.2.1.bias"]
    assert not any(replace(net, head="").only_added(name) for name in trained[2:])


def test_a_block_without_multiplications_has_a_latency() -> None:
    assert 0 < million(0).high_ms <= million(1).ms < million(10**6).ms == 1.0
