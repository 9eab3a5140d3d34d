"""Which of two networks is ahead by more than chance."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from derc.paired import ahead


def marks(both: int, ours: int, theirs: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, True, False, False], [both, ours, theirs, neither])
    second = np.repeat([True, False, True, False], [both, ours, theirs, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [(0, 0, False), (1, 0, False), (2, 0, True), (6, 3, False), (7, 3, True), (3, 7, False), (55, 45, False)],
)
def test_wins_exceed_losses_by_a_standard_deviation(ours, theirs, wanted):
    assert ahead(*marks(100, ours, theirs, 20)) is wanted


def test_of_equal_networks_about_one_in_six_is_ahead():
    """Under no difference the wins among n discordant images are binomial: the exact share is summed up."""
    discordant = 60
    exact = (
        sum(comb(discordant, k) for k in range(discordant + 1) if 2 * k - discordant > discordant**0.5) / 2**discordant
    )
    random = np.random.default_rng(1)
    draws = [int(k) for k in random.binomial(discordant, 0.5, size=4000)]
    share = np.mean([ahead(*marks(200, wins, discordant - wins, 10)) for wins in draws])
    assert share == pytest.approx(exact, abs=0.02) and 0.1 < exact < 0.2
