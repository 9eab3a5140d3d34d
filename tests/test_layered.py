"""The layered graph against the definition of an assembly, and the costs of its paths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import layered, stitching
from derc.artifacts import Assembly, BlockRef, Partition, decode, digest, encode
from derc.errors import DercError
from derc.passes.select import Select
from tests.layers import legal, paths, random_problem
from tests.zoos import random_cuts


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(3, 6), min_size=1, max_size=3),
    heads=st.sampled_from([(), ("d0",)]),
    one_per_set=st.booleans(),
    lower=st.sampled_from([(), ("int8",), ("bf16", "int8")]),
    formed=st.booleans(),
)
def test_paths_are_the_legal_assemblies(
    seed: int, sizes: list[int], heads: tuple[str, ...], one_per_set: bool, lower: tuple[str, ...], formed: bool
) -> None:
    problem = random_problem(seed, tuple(sizes), lower=lower, formed=formed)
    options = Select(heads=heads, one_per_set=one_per_set)
    found = set(paths(problem.learn(options)))
    assert found == set(legal(problem, options))
    built = [
        name for name in heads or problem.partition.blocks if set(problem.intact(name).blocks) <= set(problem.variants)
    ]
    assert all(problem.intact(name) in found for name in built)
    assert lower or len(built) == len(heads or problem.partition.blocks)
    if one_per_set:
        assert all([block.set for block in assembly.blocks] == [0, 1, 2] for assembly in found)


def test_a_donor_of_few_units_goes_on_in_its_own_next_set_and_leaves_nothing_out() -> None:
    problem = random_problem(7, (3, 8), blocks=6)
    graph = layered.build(problem.cuts, problem.partition)
    assert set(paths(problem.learn(Select()))) == set(legal(problem, Select()))
    chain = problem.partition.blocks["d0"]
    assert [block.set for block in chain][:: len(chain) - 1] == [0, 5]
    assert not graph.skipped[list(graph.path(Assembly(chain)) or ())].any()
    for edge in graph.edges:
        if edge.source and edge.target and edge.source.donor == "d0":
            own = next(block for block in chain if block.first == edge.source.last)
            assert edge.skipped == max(edge.target.set - own.set, 0)


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


@pytest.mark.parametrize("formed", [False, True])
def test_path_and_assembly_are_inverse(formed: bool) -> None:
    problem = random_problem(5, (4, 4, 4), formed=formed)
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


def in_precisions(assembly: Assembly, *precisions: str) -> Assembly:
    return Assembly(tuple(replace(b, precision=p) for b, p in zip(assembly.blocks, precisions, strict=True)))


def test_a_donor_goes_on_in_any_precision_without_a_stitch() -> None:
    problem = random_problem(4, (6, 5))
    every = {str(replace(block, precision=p)) for block in problem.variants for p in ("fp32", "int8")}
    graph = layered.build(problem.cuts, problem.partition, timed=every)
    plain = graph.path(problem.intact("d0")) or ()
    for precisions in itertools.product(("fp32", "int8"), repeat=3):
        path = graph.path(in_precisions(problem.intact("d0"), *precisions)) or ()
        assert len(path) == len(plain) and all(graph.edges[place].stitch is None for place in path)
        costs, want = graph.costs(path), graph.costs(plain)
        assert (costs["params"], costs["macs"]) == (want["params"], want["macs"])


def test_an_int8_block_takes_a_quarter_of_the_weights_and_its_stitch_does_not() -> None:
    problem = random_problem(3, (4, 5), blocks=2)
    every = {str(replace(block, precision=p)) for block in problem.variants for p in ("fp32", "int8")}
    graph = layered.build(problem.cuts, problem.partition, timed=every)
    first, last = problem.partition.blocks["d0"][0], problem.partition.blocks["d1"][1]
    plain = Assembly((first, last))
    saved = sum(unit.params for unit in problem.cuts.donors["d1"].units[last.first :]) * 3 / 1e6
    full, mixed = (graph.costs(graph.path(a) or ())["memory_mb"] for a in (plain, in_precisions(plain, "fp32", "int8")))
    assert full - mixed == pytest.approx(saved)
    known = {str(replace(last, precision="int8")): 12_345}
    graph = layered.build(problem.cuts, problem.partition, timed=every, weights=known)
    counted = graph.costs(graph.path(in_precisions(plain, "fp32", "int8")) or ())["memory_mb"]
    own = sum(unit.params for unit in problem.cuts.donors["d1"].units[last.first :])
    assert counted - mixed == pytest.approx((12_345 - own) / 1e6)


def test_intact_means_the_donor_as_it_is() -> None:
    problem = random_problem(4, (6, 5))
    donor = problem.intact("d0")
    lower = in_precisions(donor, "fp32", "int8", "fp32")
    assert donor.intact and donor.plain is donor
    assert not lower.intact and not any(lower.stitched) and lower.plain == donor
    assert str(lower) == str(donor).replace(str(donor.blocks[1]), f"{donor.blocks[1]}@int8")


def test_a_precision_is_stored_only_where_it_is_a_lower_one() -> None:
    donor = random_problem(4, (6, 5)).intact("d0")
    assert "precision" not in encode(donor)[0]
    lower = in_precisions(donor, "fp32", "int8", "fp32")
    assert encode(lower)[0].count("precision") == 1
    assert decode(Assembly, *encode(lower)) == lower
    assert digest(lower) != digest(donor)


def test_a_table_without_any_block_of_the_partition_is_an_error() -> None:
    problem = random_problem(7, (6, 6))
    with pytest.raises(DercError, match="no block of this partition"):
        layered.build(problem.cuts, problem.partition, timed=["d0[0:99]"])
