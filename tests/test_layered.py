"""The layered graph against the definition of an assembly, and the costs of its paths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import layered, stitching
from derc.artifacts import Assembly, BlockRef, Partition
from derc.passes.select import Select
from tests.layers import legal, paths, random_problem
from tests.zoos import random_cuts


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(3, 6), min_size=1, max_size=3),
    heads=st.sampled_from([(), ("d0",)]),
    one_per_set=st.booleans(),
)
def test_paths_are_the_legal_assemblies(seed: int, sizes: list[int], heads: tuple[str, ...], one_per_set: bool) -> None:
    problem = random_problem(seed, tuple(sizes))
    options = Select(heads=heads, one_per_set=one_per_set)
    found = set(paths(problem.learn(options)))
    assert found == set(legal(problem, options))
    assert all(problem.intact(name) in found for name in heads or problem.partition.blocks)
    if one_per_set:
        assert all([block.set for block in assembly.blocks] == [0, 1, 2] for assembly in found)


def test_costs_are_the_units_and_the_stitches() -> None:
    problem = random_problem(3, (4, 5), blocks=2)
    graph = layered.build(problem.cuts, problem.partition)
    first, last = problem.partition.blocks["d0"][0], problem.partition.blocks["d1"][1]
    costs = graph.costs(graph.path(Assembly((first, last))) or ())
    donors = problem.cuts.donors
    units = donors["d0"].units[: first.last] + donors["d1"].units[last.first :]
    stitch = stitching.cost(donors["d0"].cuts[first.last].type, donors["d1"].cuts[last.first].type)
    params = sum(unit.params for unit in units) + stitch.params
    assert costs["params"] == params
    assert costs["macs"] == sum(unit.macs for unit in units) + stitch.macs
    peak = max(*(unit.bytes for unit in units), stitch.bytes)
    assert costs["memory_mb"] == pytest.approx((4 * params + peak) / 1e6)


def test_an_intact_donor_costs_what_the_donor_costs() -> None:
    problem = random_problem(4, (6, 5))
    graph = layered.build(problem.cuts, problem.partition)
    for name, donor in problem.cuts.donors.items():
        costs = graph.costs(graph.path(problem.intact(name)) or ())
        assert costs["params"] == sum(unit.params for unit in donor.units)
        assert costs["macs"] == sum(unit.macs for unit in donor.units)


def test_path_and_assembly_are_inverse() -> None:
    problem = random_problem(5, (4, 4, 4))
    learnt = problem.learn(Select())
    for assembly in paths(learnt):
        path = learnt.graph.path(assembly)
        assert path is not None
        assert learnt.graph.assembly(path) == assembly


def test_what_is_no_path_has_none() -> None:
    problem = random_problem(5, (4, 4))
    graph = layered.build(problem.cuts, problem.partition, ("d0",))
    assert graph.path(problem.intact("d1")) is None
    assert graph.path(Assembly((BlockRef("d0", 0, 9, 0),))) is None
    assert graph.path(Assembly(problem.partition.blocks["d0"][1:])) is None


def test_nothing_follows_pooled_features_but_their_own_head() -> None:
    cuts = random_cuts(1, (3, 3), pooled=True)
    blocks = {name: tuple(BlockRef(name, i, i + 1, i) for i in range(3)) for name in cuts.donors}
    graph = layered.build(cuts, Partition(blocks, 0.0, None, {}))
    into_middle = {str(edge) for edge in graph.edges if edge.source and edge.source.set == 1 and edge.target}
    assert "d0[1:2] > d0[2:3]" in into_middle
    assert all(
        edge.stitch is None or edge.stitch.split(">")[1].startswith("NC")
        for edge in graph.edges
        if edge.source and edge.source.set == 1
    )
