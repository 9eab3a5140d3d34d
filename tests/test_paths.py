"""The search for the cheapest paths against enumeration, with upper and lower limits and peaks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc.dag import Dag, Limits
from derc.dual import maximise
from derc.enumeration import Apart, Found, enumerate_paths
from derc.paths import cheapest
from tests.dags import brute_force, costs_of, every_path, random_dag, random_limits, within

problems = {
    "seed": st.integers(0, 10**6),
    "layers": st.integers(1, 4),
    "width": st.integers(1, 5),
    "resources": st.integers(1, 4),
    "two_sided": st.booleans(),
    "peaked": st.booleans(),
}


@dataclass
class Taking:
    """Takes what it is handed."""

    found: Found | None = None
    thresholds: list[float] = field(default_factory=list)

    def __call__(self, found: Found, threshold: float) -> int:
        self.found = found
        self.thresholds.append(threshold)
        return len(found.costs)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(**problems, wanted=st.integers(1, 20))
def test_the_cheapest_are_those_of_enumeration(seed, layers, width, resources, two_sided, peaked, wanted):
    dag = random_dag(seed, layers, width, resources)
    limits = random_limits(dag, seed, two_sided=two_sided, peaked=peaked)
    truth, taking = brute_force(dag, limits), Taking()
    outcome = cheapest(dag, limits, wanted, taking)
    found = taking.found.costs
    assert outcome.status == ("certified" if len(truth) >= wanted else "exhausted")
    assert found[:wanted] == pytest.approx(truth[:wanted], abs=1e-12)
    if truth:
        assert outcome.bound <= truth[0] + 1e-12
        assert costs_of(dag, taking.found) == pytest.approx(found, abs=1e-12)
        assert all(within(dag, limits, [int(e) for e in row if e >= 0]) for row in taking.found.edges)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(**problems)
def test_no_path_within_the_limits_costs_less_than_the_bound(seed, layers, width, resources, two_sided, peaked):
    dag = random_dag(seed, layers, width, resources)
    limits = random_limits(dag, seed, two_sided=two_sided, peaked=False)
    dag = dag.kept(dag.connected)
    if not len(dag.tail):
        return
    dual, truth = maximise(dag, limits), brute_force(dag, limits)
    assert not truth or (dual.bound <= truth[0] + 1e-9 and not dual.impossible)
    for path in every_path(dag)[:50]:
        assert dual.weights[path].sum() + dual.constant >= dual.bound - 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), resources=st.integers(1, 3), two_sided=st.booleans())
def test_the_bound_is_that_of_the_linear_program_over_all_paths(seed, resources, two_sided):
    from scipy.optimize import linprog

    dag = random_dag(seed, 3, 4, resources, 0.0)
    limits = random_limits(dag, seed, two_sided=two_sided, peaked=False)
    dag = dag.kept(dag.connected)
    paths = every_path(dag)
    costs = np.array([dag.cost[path].sum() for path in paths])
    totals = np.array([dag.amounts[:, path].sum(axis=1) for path in paths]).T
    upper, lower = np.isfinite(limits.upper), np.isfinite(limits.lower)
    rows = np.vstack([totals[upper], -totals[lower]])
    right = np.concatenate([limits.high[upper], -limits.low[lower]])
    truth = linprog(costs, rows, right, np.ones((1, len(paths))), [1.0])
    dual = maximise(dag, limits)
    if truth.status == 2:
        assert dual.impossible
        return
    assert not dual.impossible
    assert truth.fun - 1e-4 * (costs.max() - costs.min()) <= dual.bound <= truth.fun + 1e-9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), most=st.integers(0, 2))
def test_what_must_keep_apart_does(seed, most):
    dag = random_dag(seed, 3, 4)
    limits = random_limits(dag, seed, two_sided=True, peaked=False)
    paths = every_path(dag)
    group = np.zeros((1, len(dag.tail)), np.int16)
    group[0, paths[seed % len(paths)]] = 1
    dag_on = dag.kept(dag.connected)
    found = enumerate_paths(dag_on, limits, maximise(dag_on, limits), 100.0, Apart(group, np.array([most])))
    truth = [p for p in paths if within(dag, limits, p) and group[0, p].sum() <= most]
    assert found.complete
    assert found.costs == pytest.approx(sorted(dag.cost[p].sum() for p in truth), abs=1e-12)


def test_dominance_would_miss_what_a_lower_limit_asks_for():
    level = np.array([0, 1, 2, 3])
    tail, head = np.array([0, 0, 1, 2]), np.array([1, 1, 2, 3])
    dag = Dag(
        level, tail, head, np.array([0.0, 1.0, 0.0, 0.0]), np.array([[0.0, 5.0, 1.0, 1.0]]), np.zeros(4), np.arange(4)
    )
    taking = Taking()
    cheapest(dag, Limits(np.array([6.0]), np.array([8.0])), 1, taking)
    assert taking.found.costs.tolist() == [1.0]


def test_limits_that_no_path_meets_are_said_to_be_without_enumeration():
    dag = random_dag(0, 6, 40, 2, 0.0)
    taking = Taking()
    outcome = cheapest(dag, Limits(np.full(2, -np.inf), np.array([0.01, 5.0])), 1, taking)
    assert (outcome.status, outcome.begun, len(taking.found.costs)) == ("exhausted", 0, 0)


def test_no_path_at_all():
    dag = random_dag(0, 2, 3)
    dag = dag.kept(dag.head != dag.nodes - 1)
    assert cheapest(dag, Limits(np.full(2, -np.inf), np.full(2, np.inf)), 1, Taking()).status == "exhausted"


def test_out_of_time_says_so_and_hands_over_what_it_has():
    dag, taking = random_dag(0, 4, 30, 2, 0.0), Taking()
    outcome = cheapest(dag, Limits(np.full(2, 0.5), np.full(2, 1.5)), 100_000, taking, deadline=0.0)
    assert outcome.status == "time"
    assert taking.thresholds[-1] == -np.inf
    assert outcome.bound <= outcome.threshold
