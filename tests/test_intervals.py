"""Blocks between any cuts against their definition, and the latencies that they are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import intervals, stitching
from derc.artifacts import Assembly, BlockRef
from derc.backends.gurobi import Gurobi
from derc.backends.highs import Highs
from derc.errors import DercError, InfeasibleError, UsageError
from derc.milp import Exact, Solver
from derc.passes.select import Select, select
from tests.layers import Problem, fits, paths, random_knowledge, random_problem
from tests.zoos import latency

INTERVAL = Select(interval=True)


def legal(problem: Problem, timed: set[str]) -> Iterator[tuple[BlockRef, ...]]:
    """Every chain of blocks, straight from the definition."""
    donors = problem.cuts.donors
    depth = {name: intervals.depths(donor) for name, donor in donors.items()}
    blocks = [
        form
        for name, donor in donors.items()
        for first in range(len(donor.units))
        for last in range(first + 1, len(donor.units) + 1)
        for precision in ("fp32", "int8")
        if str(form := BlockRef(name, first, last, 0, precision)) in timed
    ]

    def joins(a: BlockRef, b: BlockRef) -> bool:
        if depth[b.donor][b.last] <= depth[a.donor][a.last] or a.last == len(donors[a.donor].units) or b.first == 0:
            return False
        if a.donor == b.donor and b.first <= a.last:
            return a.last == b.first and a.precision != b.precision
        return stitching.keeps_places(donors[a.donor].cuts[a.last].type, donors[b.donor].cuts[b.first].type)

    def grow(prefix: tuple[BlockRef, ...]) -> Iterator[tuple[BlockRef, ...]]:
        if prefix[-1].last == len(donors[prefix[-1].donor].units):
            yield prefix
        for block in blocks:
            if joins(prefix[-1], block):
                yield from grow((*prefix, block))

    for block in blocks:
        if block.first == 0:
            yield from grow((block,))


def plainly(assembly: Assembly) -> tuple[tuple[str, int, int, str], ...]:
    """Runs of one donor in one precision, whatever their sets."""
    runs: list[tuple[str, int, int, str]] = []
    for b in assembly.blocks:
        if runs and (runs[-1][0], runs[-1][2], runs[-1][3]) == (b.donor, b.first, b.precision):
            runs[-1] = (b.donor, runs[-1][1], b.last, b.precision)
        else:
            runs.append((b.donor, b.first, b.last, b.precision))
    return tuple(runs)


@pytest.mark.parametrize("lower", [(), ("int8",)])
@pytest.mark.parametrize("seed", range(4))
def test_paths_are_the_chains_of_blocks_each_once(seed: int, lower: tuple[str, ...]) -> None:
    problem = random_problem(seed, (3, 3), lower=lower)
    timed = set(intervals.extended(problem.table, problem.cuts, problem.partition).blocks)
    found = [plainly(assembly) for assembly in paths(problem.learn(INTERVAL))]
    assert len(found) == len(set(found))
    assert set(found) == {plainly(Assembly(chain)) for chain in legal(problem, timed)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.1, 1.0),
    longest=st.sampled_from([None, 1, 2, 3]),
    evaluated=st.integers(0, 4),
    fresh=st.booleans(),
)
def test_all_solvers_agree_with_enumeration(seed, share, longest, evaluated, fresh) -> None:
    problem = random_problem(seed, (4, 3))
    options = Select(interval=True, max_blocks=longest, top=3, fresh=fresh)
    learnt = problem.learn(options, random_knowledge(seed, problem.learn(options), evaluated))
    every = [learnt.graph.assembly(learnt.graph.path(a) or ()) for a in paths(learnt)]
    total = [learnt.predict(a)["latency_ms"] or 0.0 for a in every]
    options = replace(options, latency_ms=float(np.quantile(total, share)))
    feasible = sorted((a for a in every if fits(learnt, options, a)), key=learnt.expected_loss)
    if fresh:
        feasible = [a for a in feasible if a not in learnt.losses]
    answers = []
    for solver in (Exact(Highs()), Highs(), Gurobi()):
        if not feasible:
            _finds_nothing(learnt, options, solver)
            continue
        answers.append([c.objective for c in select(learnt, options, solver).candidates])
        assert fresh or answers[-1][0] == pytest.approx(learnt.expected_loss(feasible[0]), abs=1e-6)
        assert answers[-1] == pytest.approx(answers[0], abs=1e-6)


def _finds_nothing(learnt, options: Select, solver: Solver) -> None:
    if options.fresh and learnt.losses:
        assert not select(learnt, options, solver).candidates
        return
    with pytest.raises(InfeasibleError):
        select(learnt, options, solver)


def test_an_intact_donor_is_its_assembly_of_the_partition_and_one_piece() -> None:
    problem = random_problem(3, (5, 4))
    learnt = problem.learn(INTERVAL)
    intact = problem.intact("d0")
    path = learnt.graph.path(intact)
    assert path is not None and len(path) == 2
    assert learnt.graph.assembly(path) == intact
    assert learnt.predict(intact)["latency_ms"] == problem.table.donors["d0"].ms
    only = select(problem.learn(INTERVAL), replace(INTERVAL, max_blocks=1), Exact(Highs())).candidates
    assert {c.assembly for c in only} == {problem.intact("d0"), problem.intact("d1")}


def test_what_the_partition_reaches_the_intervals_reach() -> None:
    problem = random_problem(5, (6, 5, 5))
    with_sets, between = problem.learn(Select()), problem.learn(INTERVAL)
    shared = [a for a in paths(with_sets) if between.graph.path(a) is not None]
    assert len(shared) > len(list(paths(with_sets))) / 2
    for assembly in shared:
        assert between.graph.costs(between.graph.path(assembly) or ()) == with_sets.graph.costs(
            with_sets.graph.path(assembly) or ()
        )


def test_latencies_are_shares_of_the_partitions_blocks_and_never_less_than_the_whole() -> None:
    problem = random_problem(6, (6, 5), lower=("int8",))
    table = intervals.extended(problem.table, problem.cuts, problem.partition)
    assert all(table.blocks[name] is known for name, known in problem.table.blocks.items())
    for name, chain in problem.partition.blocks.items():
        donor = problem.cuts.donors[name]
        parts = {b: problem.table.blocks.get(str(b)) for b in chain}
        for cut in range(1, len(donor.units)):
            front, back = str(BlockRef(name, 0, cut, 0)), str(BlockRef(name, cut, len(donor.units), 0))
            if None in parts.values():
                continue
            whole = sum(one.ms for one in parts.values() if one)
            assert table.blocks[front].ms + table.blocks[back].ms >= whole - 1e-12
            assert table.blocks[front].ms <= whole + 1e-12
        for first, last in ((0, 1), (1, 2)):
            both = str(BlockRef(name, chain[first].first, chain[last].last, 0))
            if parts[chain[first]] and parts[chain[last]]:
                assert table.blocks[both].ms == pytest.approx(parts[chain[first]].ms + parts[chain[last]].ms)
                assert table.blocks[both].provenance == "predicted"


def test_a_block_that_touches_what_could_not_be_built_is_left_out() -> None:
    problem = random_problem(7, (6, 5))
    lost = problem.partition.blocks["d0"][1]
    known = {name: ms for name, ms in problem.table.blocks.items() if name != str(lost)}
    table = intervals.extended(replace(problem.table, blocks=known), problem.cuts, problem.partition)
    inside = [b for b in table.blocks if b.startswith("d0")]
    assert all(int(b[3:-1].split(":")[1]) <= lost.first or int(b[3:-1].split(":")[0]) >= lost.last for b in inside)


def test_errors(monkeypatch) -> None:
    problem = random_problem(7, (6, 5))
    with pytest.raises(UsageError, match="exclude each other"):
        problem.learn(replace(INTERVAL, one_per_set=True))
    with pytest.raises(DercError, match="no block of these donors"):
        replace(problem, table=replace(problem.table, blocks={"x[0:1]": latency(1.0)})).learn(INTERVAL)
    monkeypatch.setattr(intervals, "MOST_STEPS", 10)
    with pytest.raises(UsageError, match="more than 10: name fewer donors"):
        problem.learn(INTERVAL)
