"""The published partition, derc's baseline: what it finds is allowed, and never above derc's own."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import published
from benchmarks.search_partition import valid
from benchmarks.zoos import synthetic
from derc import equivalence_search, equivalence_sketch


@pytest.mark.parametrize("centres", ["anywhere", "covering"])
def test_both_ways_to_move_a_boundary_give_the_same_valid_partition(centres: str) -> None:
    zoo = synthetic(6, 1).zoo(sketched=False)
    slow = published.partition(zoo, 3, 6, centres=centres)
    fast = published.partition(zoo, 3, 6, centres=centres, reach=published.at_once)
    np.testing.assert_array_equal(slow.cuts, fast.cuts)
    assert valid(zoo, slow.cuts)
    assert slow.objective == pytest.approx(zoo.objective(slow.cuts[None])[0])
    more = published.partition(zoo, 3, 30, centres=centres, reach=published.at_once)
    assert more.objective >= slow.objective
    ours = zoo.objective(equivalence_search.search(zoo, 16, 0)[None])[0]
    assert ours >= more.objective - 1e-9


def test_rows_and_similarities_give_the_baseline_about_the_same() -> None:
    made = synthetic(10, 2)
    dense, rows = made.zoo(sketched=False), made.zoo(sketched=True)
    values = [published.partition(zoo, 0, 10, reach=published.at_once).objective for zoo in (dense, rows)]
    assert values[1] == pytest.approx(values[0], rel=0.02)
    found = equivalence_sketch.search(rows, 8, 0)
    assert rows.objective(found[None])[0] >= values[1]


def test_random_cuts_are_allowed_and_reach_every_window() -> None:
    zoo = synthetic(3, 5).zoo(sketched=False)
    random = np.random.default_rng(0)
    drawn = [np.stack([published.random_cuts(menu, 4, random) for menu in zoo.menus]) for _ in range(200)]
    assert all(valid(zoo, cuts) for cuts in drawn)
    for d, menu in enumerate(zoo.menus):
        assert {cuts[d, 1] for cuts in drawn} == set(range(menu.low[1], menu.high[1] + 1))
