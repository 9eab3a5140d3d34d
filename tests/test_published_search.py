"""The searches that derc's is compared with, on problems whose answer is known."""

from __future__ import annotations

import zlib

import pytest

from benchmarks.published_search import METHODS, Space, Trace
from derc import layered
from derc.artifacts import Assembly
from derc.passes.select import Select
from tests.layers import paths, random_problem


def space_of(seed: int) -> Space:
    problem = random_problem(seed, (5, 5, 5, 5, 5), blocks=3)
    graph = layered.build(problem.cuts, problem.partition, one_per_set=True)
    learnt = problem.learn(Select(one_per_set=True))
    return Space(graph, tuple(sorted(paths(learnt), key=str)))


def separable(assembly: Assembly) -> float:
    """A sum of numbers that belong to the blocks."""
    return sum(zlib.crc32(str(block).encode()) % 1000 / 1000 for block in assembly.blocks)


@pytest.mark.parametrize("name", METHODS)
def test_no_search_asks_more_than_its_budget_or_outside_the_space(name: str) -> None:
    space = space_of(0)
    for budget in (1, 7, 30):
        trace = Trace(separable, budget)
        METHODS[name](space, trace, 0)
        assert len(trace.values) == budget
        assert set(trace.seen) <= set(space.allowed)


@pytest.mark.parametrize("name", METHODS)
def test_searches_repeat_under_a_seed_and_differ_between_seeds(name: str) -> None:
    space, found = space_of(1), []
    for seed in (0, 0, 1):
        trace = Trace(separable, 20)
        METHODS[name](space, trace, seed)
        found.append(list(trace.seen))
    assert found[0] == found[1] != found[2]


def test_one_pass_of_swaps_solves_what_is_separable() -> None:
    space = space_of(2)
    trace = Trace(separable, len(space.allowed))
    METHODS["published"](space, trace, 0)
    best = max(map(separable, space.allowed))
    first = next(number for number, value in enumerate(trace.values) if value == best)
    assert first <= 2 * len(space.graph.blocks)


def test_evolution_beats_random_search_on_what_is_separable() -> None:
    space, means = space_of(3), {}
    for name in ("evolution", "random"):
        total = 0.0
        for seed in range(10):
            trace = Trace(separable, 60)
            METHODS[name](space, trace, seed)
            total += max(trace.values)
        means[name] = total / 10
    assert len(space.allowed) > 60
    assert means["evolution"] >= means["random"]
