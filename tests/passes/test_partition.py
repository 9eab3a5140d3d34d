"""The partition against brute force, and the promises that it makes about its blocks."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations, pairwise, product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import streaming
from derc.artifacts import BlockRef, CutDonor, CutId, CutZoo, EmbeddedZoo, Partition, decode, encode
from derc.backends.gurobi import Gurobi
from derc.backends.highs import Highs
from derc.errors import UsageError
from derc.passes.partition import PartitionZoo, partition
from derc.similarity import similarity as similarity_of
from tests.zoos import random_cuts, random_embedded

Ends = tuple[int, ...]


def similarity(embedded: EmbeddedZoo, one: tuple[str, int], other: tuple[str, int]) -> float:
    rows = embedded.position
    return float(embedded.similarity[rows[CutId(*one)], rows[CutId(*other)]])


def objective(embedded: EmbeddedZoo, ends: dict[str, Ends]) -> float:
    """Σ over sets and donor pairs of s(in, in') + s(out, out'), term by term."""
    total = 0.0
    for one, other in combinations(ends, 2):
        for k in range(len(ends[one]) - 1):
            total += similarity(embedded, (one, ends[one][k]), (other, ends[other][k]))
            total += similarity(embedded, (one, ends[one][k + 1]), (other, ends[other][k + 1]))
    return total


def largest_share(donor: CutDonor, ends: Ends) -> float:
    macs = [unit.macs for unit in donor.units]
    sizes = [sum(macs[a:b]) for a, b in pairwise(ends)]
    return max(sizes) * (len(ends) - 1) / sum(macs)


def all_ends(donor: CutDonor, blocks: int) -> list[Ends]:
    last = len(donor.units)
    return [(0, *inner, last) for inner in combinations(range(1, last), blocks - 1)]


def brute_force(cuts: CutZoo, embedded: EmbeddedZoo, options: PartitionZoo) -> float:
    menus = []
    for donor in cuts.donors.values():
        every = all_ends(donor, options.blocks)
        limit = max(1 + options.epsilon, min(largest_share(donor, ends) for ends in every))
        menus.append([ends for ends in every if largest_share(donor, ends) <= limit * (1 + 1e-12)])
    return max(objective(embedded, dict(zip(cuts.donors, ends, strict=True))) for ends in product(*menus))


def ends_of(found: Partition) -> dict[str, Ends]:
    return {name: (0, *(block.last for block in blocks)) for name, blocks in found.blocks.items()}


def check_promises(cuts: CutZoo, found: Partition, options: PartitionZoo) -> None:
    for name, donor in cuts.donors.items():
        blocks = found.blocks[name]
        assert [block.set for block in blocks] == list(range(options.blocks))
        assert blocks[0].first == 0
        assert blocks[-1].last == len(donor.units)
        assert all(a.last == b.first for a, b in pairwise(blocks))
        assert all(block.first < block.last for block in blocks)
        share = largest_share(donor, ends_of(found)[name])
        assert share <= (1 + found.epsilon[name]) * (1 + 1e-9)
        least = min(largest_share(donor, ends) for ends in all_ends(donor, options.blocks)) - 1
        assert found.epsilon[name] == pytest.approx(max(options.epsilon, least))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(3, 6), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    epsilon=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_search_and_program_against_brute_force(seed: int, sizes: list[int], blocks: int, epsilon: float) -> None:
    cuts = random_cuts(seed, tuple(sizes))
    embedded = random_embedded(seed, cuts)
    options = PartitionZoo(blocks=blocks, epsilon=epsilon)
    truth = brute_force(cuts, embedded, options)
    found = partition(cuts, embedded, options, seed=seed)
    exact = partition(cuts, embedded, options, seed=seed, solver=Highs())
    check_promises(cuts, found, options)
    check_promises(cuts, exact, options)
    assert found.objective == pytest.approx(objective(embedded, ends_of(found)))
    assert found.objective == pytest.approx(truth, abs=1e-7)
    assert exact.objective == pytest.approx(truth, abs=1e-7)
    assert exact.bound is not None
    assert exact.objective <= exact.bound <= truth + 1e-4


def test_the_integer_program_alone_finds_the_optimum() -> None:
    cuts = random_cuts(7, (6, 5, 6))
    embedded = random_embedded(7, cuts)
    options = PartitionZoo(blocks=3, starts=1)
    exact = partition(cuts, embedded, options, solver=Gurobi())
    assert exact.objective == pytest.approx(brute_force(cuts, embedded, options))


def test_a_zoo_of_24_donors_takes_less_than_a_second_and_is_deterministic() -> None:
    cuts = random_cuts(3, (30,) * 24)
    embedded = random_embedded(3, cuts)
    start = time.perf_counter()
    first = partition(cuts, embedded, PartitionZoo(), seed=5)
    assert time.perf_counter() - start < 1.0
    assert first == partition(cuts, embedded, PartitionZoo(), seed=5)
    assert first.objective > partition(cuts, embedded, PartitionZoo(starts=1), seed=5).objective - 1e-9


def test_a_zoo_of_one_donor_takes_the_narrow_cuts() -> None:
    cuts = random_cuts(1, (8,))
    embedded = random_embedded(1, cuts)
    found = partition(cuts, embedded, PartitionZoo(blocks=3, epsilon=3.0))
    inner = [cut.type.numel for cut in cuts.donors["d0"].cuts[1:-1]]
    chosen = [cuts.donors["d0"].cuts[block.last].type.numel for block in found.blocks["d0"][:-1]]
    assert sum(chosen) == sum(sorted(inner)[:2])


def test_equal_similarity_prefers_the_narrower_cut() -> None:
    cuts = random_cuts(2, (5, 5))
    embedded = random_embedded(2, cuts)
    flat = replace(embedded, similarity=np.ones_like(embedded.similarity))
    found = partition(cuts, flat, PartitionZoo(blocks=2, epsilon=1.0))
    for name, donor in cuts.donors.items():
        narrowest = min(cut.type.numel for cut in donor.cuts[1:-1])
        assert donor.cuts[found.blocks[name][0].last].type.numel == narrowest


def test_one_unit_too_big_for_its_share_takes_the_least_slack() -> None:
    cuts = random_cuts(4, (4,))
    donor = cuts.donors["d0"]
    units = tuple(replace(unit, macs=size) for unit, size in zip(donor.units, (10, 70, 10, 10), strict=True))
    cuts = CutZoo({"d0": replace(donor, units=units)})
    found = partition(cuts, random_embedded(4, cuts), PartitionZoo(blocks=2, epsilon=0.2))
    assert found.epsilon["d0"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((3, 4), r"5 blocks, for d1 has the most units, 4.*--blocks 4"), ((6, 1), r"donor d1.*--blocks 1")],
)
def test_too_few_units_names_the_donor_and_the_option(sizes: tuple[int, ...], said: str) -> None:
    cuts = random_cuts(0, sizes)
    with pytest.raises(UsageError, match=said):
        partition(cuts, random_embedded(0, cuts), PartitionZoo(blocks=5))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), units=st.integers(2, 5), rows=st.booleans())
def test_a_donor_of_few_units_takes_the_sets_that_its_cuts_are_most_like(seed: int, units: int, rows: bool) -> None:
    cuts = random_cuts(seed, (8, units, 7))
    embedded = random_embedded(seed, cuts)
    if rows:
        features = np.random.default_rng(seed).random((len(embedded.index), 6)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        embedded = replace(embedded, rows=features, similarity=features.astype(np.float64) @ features.T)
    found = partition(cuts, embedded, PartitionZoo(blocks=6))
    alone = partition(CutZoo({n: cuts.donors[n] for n in ("d0", "d2")}), embedded, PartitionZoo(blocks=6))
    assert {name: found.blocks[name] for name in ("d0", "d2")} == alone.blocks and found.objective == alone.objective
    assert list(found.blocks) == ["d0", "d1", "d2"]

    def worth(sets: tuple[int, ...]) -> float:
        total = 0.0
        for cut, (before, after) in enumerate(pairwise(sets), 1):
            for name in ("d0", "d2"):
                ends, begins = alone.blocks[name][before].last, alone.blocks[name][after].first
                total += similarity(embedded, ("d1", cut), (name, ends))
                total += similarity(embedded, ("d1", cut), (name, begins))
        return total

    blocks = found.blocks["d1"]
    assert [(block.first, block.last) for block in blocks] == [(unit, unit + 1) for unit in range(units)]
    every = [(0, *inner, 5) for inner in combinations(range(1, 5), units - 2)]
    assert worth(tuple(block.set for block in blocks)) == pytest.approx(max(map(worth, every)), abs=1e-5)


@pytest.mark.parametrize(("options", "word"), [(PartitionZoo(0), "--blocks"), (PartitionZoo(4, -1), "--epsilon")])
def test_bad_options(options: PartitionZoo, word: str) -> None:
    cuts = random_cuts(0, (6,))
    with pytest.raises(UsageError, match=word):
        partition(cuts, random_embedded(0, cuts), options)


class Bench:
    """The parts of a context that the pass reads."""

    seed = 0
    solver = Highs()


def test_the_pass_runs_from_a_context_and_keys_on_its_seed() -> None:
    cuts = random_cuts(0, (6, 5))
    context = cast(Any, Bench())
    step = PartitionZoo(blocks=3, exact=True)
    found = step.run(context, cuts, random_embedded(0, cuts))
    assert found.bound is not None
    assert found.blocks["d0"][0] == BlockRef("d0", 0, found.blocks["d0"][0].last, 0)
    assert step.inputs(context) == "0 highs"


def features_of(cuts: CutZoo, seed: int, images: int = 96, *, noise: float = 0.3) -> list[np.ndarray]:
    """Features of all cuts, in order, that drift along depth through four stages that all donors share."""
    random = np.random.default_rng(seed)
    stages = random.standard_normal((4, images, 6))
    made = []
    for donor in cuts.donors.values():
        macs = np.concatenate([[0], np.cumsum([unit.macs for unit in donor.units])])
        depth = 3 * macs / macs[-1]
        weight = np.maximum(0, 1 - np.abs(depth[:, None] - np.arange(4)))
        own = np.einsum("cs,snp->cnp", weight, stages)
        made += [*(own + noise * random.standard_normal(own.shape)).astype(np.float32)]
    return made


def embedded_of(cuts: CutZoo, features: list[np.ndarray], *, sketched: bool = False) -> EmbeddedZoo:
    """What `embed` makes of features: similarities with those of both halves, or sketched rows."""
    index = tuple(CutId(name, i) for name, donor in cuts.donors.items() for i in range(len(donor.cuts)))
    images = len(features[0])
    parts = slice(0, images), slice(0, images // 2), slice(images // 2, images)
    whole, *halves = (similarity_of([part[rows] for part in features], "cka-debiased") for rows in parts)
    if not sketched:
        return EmbeddedZoo(index, whole, images, "test", halves=np.stack(halves).astype(np.float32))
    bounds = streaming.bounds(images)
    sketch = streaming.Sketched(len(bounds))
    columns = [
        sketch.project(streaming.vectors([part[a:b] for part in features], (b - a) / images, "cka"), number)
        for number, (a, b) in enumerate(bounds)
    ]
    return EmbeddedZoo(index, np.zeros((0, 0)), images, "test", rows=streaming.unit_rows(np.concatenate(columns, 1)))


def test_sketched_rows_give_about_the_partition_that_similarities_give() -> None:
    cuts = random_cuts(5, (14, 22, 17, 30, 12, 19))
    features = features_of(cuts, 5)
    dense, rows = embedded_of(cuts, features), embedded_of(cuts, features, sketched=True)
    options = PartitionZoo()
    one, other = partition(cuts, dense, options), partition(cuts, rows, options)
    check_promises(cuts, one, options)
    check_promises(cuts, other, options)
    values = [objective(dense, ends_of(found)) for found in (one, other)]
    assert values[0] == pytest.approx(one.objective)
    assert values[1] >= 0.98 * values[0]
    assert other.moved is not None


def test_near_ties_lose_less_than_a_ten_thousandth() -> None:
    cuts = random_cuts(8, (30, 42, 25, 38, 33))
    embedded = embedded_of(cuts, features_of(cuts, 8, images=64, noise=1.0))
    found = partition(cuts, embedded, PartitionZoo())
    assert found.moved
    for tie in found.near_ties:
        ends = ends_of(found)
        assert ends[tie.donor][tie.set + 1] == tie.cut != tie.other
        assert 0 <= tie.loss < 1e-4
    without = partition(cuts, replace(embedded, halves=None), PartitionZoo())
    assert (without.moved, without.near_ties) == (None, ())
    assert without.blocks == found.blocks


def test_auto_takes_as_many_blocks_as_have_distinct_sets() -> None:
    cuts = random_cuts(6, (24, 30, 28, 26, 22))
    embedded = embedded_of(cuts, features_of(cuts, 6, images=256, noise=2.0))
    found = partition(cuts, embedded, PartitionZoo(blocks="auto"))
    blocks = len(found.blocks["d0"])
    assert list(found.distinct) == [str(k) for k in range(2, 9)]
    assert found.distinct[str(blocks)] >= 0.8
    assert all(found.distinct[str(k)] < 0.8 for k in range(blocks + 1, 9))
    assert 2 < blocks < 8
    fixed = partition(cuts, embedded, PartitionZoo(blocks=blocks))
    assert found.blocks == fixed.blocks


def test_auto_where_nothing_is_distinct_and_where_there_is_one_donor() -> None:
    cuts = random_cuts(6, (3, 9, 9))
    flat = replace(random_embedded(6, cuts), similarity=np.random.default_rng(0).random((24, 24)))
    found = partition(cuts, flat, PartitionZoo(blocks="auto"))
    assert set(found.distinct) == {"2", "3"}
    alone = random_cuts(6, (9,))
    assert len(partition(alone, random_embedded(6, alone), PartitionZoo(blocks="auto")).blocks["d0"]) == 4


def test_centres_name_the_donors_of_central_blocks() -> None:
    cuts = random_cuts(9, (12, 9, 14, 10))
    embedded = random_embedded(9, cuts)
    options = PartitionZoo(blocks=3, objective="centres")
    found = partition(cuts, embedded, options)
    pairs = partition(cuts, embedded, PartitionZoo(blocks=3))
    check_promises(cuts, found, options)
    assert len(found.centres) == 3
    assert set(found.centres) <= set(cuts.donors)
    ends, total = ends_of(found), 0.0
    for k, centre in enumerate(found.centres):
        for name in cuts.donors.keys() - {centre}:
            total += similarity(embedded, (name, ends[name][k]), (centre, ends[centre][k]))
            total += similarity(embedded, (name, ends[name][k + 1]), (centre, ends[centre][k + 1]))
    assert found.objective == pytest.approx(total)
    assert objective(embedded, ends) <= pairs.objective + 1e-9


def test_exact_states_the_gap() -> None:
    cuts = random_cuts(4, (12, 15, 18, 10))
    found = partition(cuts, random_embedded(4, cuts), PartitionZoo(), solver=Highs())
    assert found.gap == pytest.approx(0, abs=1e-5)
    assert partition(cuts, random_embedded(4, cuts), PartitionZoo()).gap is None


@pytest.mark.parametrize(
    ("options", "solver", "sketched", "word"),
    [
        (PartitionZoo(objective="medoids"), None, False, "one of pairs, centres"),
        (PartitionZoo(blocks="many"), None, False, "--blocks must be at least 1, or auto"),
        (PartitionZoo(objective="centres"), Highs(), False, "--exact proves the objective over pairs alone"),
        (PartitionZoo(objective="centres"), None, True, "--sets centres needs"),
        (PartitionZoo(), Highs(), True, "--exact needs"),
    ],
)
def test_what_does_not_go_together_is_said(
    options: PartitionZoo, solver: Highs | None, sketched: bool, word: str
) -> None:
    cuts = random_cuts(0, (6, 6))
    embedded = embedded_of(cuts, features_of(cuts, 0), sketched=sketched)
    with pytest.raises(UsageError, match=word):
        partition(cuts, embedded, options, solver=solver)


def test_a_program_too_large_to_write_down_is_refused() -> None:
    cuts = random_cuts(0, (60,) * 60)
    with pytest.raises(UsageError, match=r"--exact: the program would have \d+ variables, more than 400000"):
        partition(cuts, random_embedded(0, cuts), PartitionZoo(epsilon=1.0), solver=Highs())


def test_a_partition_survives_the_store() -> None:
    cuts = random_cuts(8, (30, 42, 25))
    found = partition(cuts, embedded_of(cuts, features_of(cuts, 8, noise=1.0)), PartitionZoo(blocks="auto"))
    assert decode(Partition, *encode(found)) == found
