"""The search among very many candidates against enumeration, and against the search of everything at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import narrowing
from derc.dag import Limits
from derc.errors import DercError
from derc.narrowing import cheapest_wide
from tests.threads import on_one_and_two
from tests.wides import brute_force, random_wide, totals, two_sided


@pytest.fixture
def narrow(monkeypatch):
    """Few pairs are searched at once, so that small problems go the way of large ones."""
    monkeypatch.setattr(narrowing, "EDGES", 40)
    monkeypatch.setattr(narrowing, "SAMPLE", 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    low=st.floats(0.3, 1.0),
    width=st.floats(0.02, 1.0),
    dense=st.booleans(),
    wanted=st.integers(1, 30),
)
def test_the_cheapest_are_those_of_enumeration(seed, sizes, low, width, dense, wanted):
    wide = random_wide(seed, tuple(sizes), dense=dense)
    limits = two_sided(wide, low, low + width)
    truth = brute_force(wide, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrowing, "EDGES", 40)
        patch.setattr(narrowing, "SAMPLE", 3)
        found = cheapest_wide(wide, limits, wanted)
    assert found.certified
    assert found.costs == pytest.approx(truth[:wanted], abs=1e-12)
    for path, cost in zip(found.candidates, found.costs, strict=True):
        own, amounts = totals(wide, tuple(path))
        assert own == pytest.approx(cost, abs=1e-12)
        assert (amounts >= limits.low).all() and (amounts <= limits.high).all()
    assert not truth or found.bound <= truth[0] + 1e-12


@pytest.mark.parametrize("dense", [False, True])
def test_narrowing_gives_what_the_search_of_everything_gives(monkeypatch, dense):
    wide = random_wide(1, (150, 140, 160, 130), dense=dense)
    limits = two_sided(wide, 0.8, 0.95)
    whole = cheapest_wide(wide, limits, 60)
    monkeypatch.setattr(narrowing, "EDGES", 2000)
    monkeypatch.setattr(narrowing, "SAMPLE", 20)
    found = cheapest_wide(wide, limits, 60)
    assert whole.certified and found.certified
    assert np.array_equal(whole.candidates, found.candidates)
    assert np.array_equal(whole.costs, found.costs)


def test_prices_bound_every_path_within_the_rounding_that_is_said():
    wide = random_wide(2, (40, 30, 20), dense=True)
    prices = np.array([0.3, -0.2])
    before, after, error = wide.through(wide.every, prices)
    dag, _ = wide.dag(wide.every)
    weights = dag.cost + prices @ dag.amounts
    exact = dag.to_nodes(weights)[1:-1] + dag.from_nodes(weights)[1:-1]
    found = np.concatenate([b + a for b, a in zip(before, after, strict=True)])
    assert 0 < error < 1e-3
    assert np.abs(found - exact).max() <= error


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.01), (50.0, 60.0)])
def test_limits_that_nothing_meets_leave_nothing_and_that_is_certain(low, high):
    wide = random_wide(3, (60, 60, 60, 60))
    found = cheapest_wide(wide, two_sided(wide, low, high), 5)
    assert found.certified and len(found.costs) == 0


@pytest.mark.usefixtures("narrow")
def test_without_limits():
    wide = random_wide(4, (12, 12, 12))
    free = Limits(np.full(2, -np.inf), np.full(2, np.inf))
    assert cheapest_wide(wide, free, 7).costs == pytest.approx(brute_force(wide, free)[:7], abs=1e-12)


def test_what_is_too_much_to_search_is_an_error(monkeypatch):
    monkeypatch.setattr(narrowing, "EDGES", 10)
    monkeypatch.setattr(narrowing, "SAMPLE", 2)
    monkeypatch.setattr(narrowing, "MOST_EDGES", 20)
    wide = random_wide(5, (30, 30, 30))
    with pytest.raises(DercError, match="too many to search: give tighter limits"):
        cheapest_wide(wide, two_sided(wide, 0.9, 1.0), 2000)


def test_out_of_time_is_not_certified():
    wide = random_wide(6, (80, 80, 80, 80))
    found = cheapest_wide(wide, two_sided(wide, 0.8, 0.9), 10_000, deadline=0.0)
    assert not found.certified and found.status == "time"


def test_one_thread_and_two_give_the_same():
    program = (
        "from tests.wides import random_wide, two_sided; from derc.narrowing import cheapest_wide\n"
        "w = random_wide(7, (500, 500, 500, 500), rank=8)\n"
        "f = cheapest_wide(w, two_sided(w, 0.8, 0.95), 50)\n"
        "print(f.status, f.candidates.tolist(), f.costs.tolist())"
    )
    answers = on_one_and_two(program)
    assert len(answers) == 1 and answers.pop().startswith("certified")
