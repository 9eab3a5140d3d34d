"""The searches for equivalence sets against enumeration and against one another, on zoos where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import equivalence_centres, equivalence_checks, equivalence_program, equivalence_search, equivalence_sketch
from derc.backends.highs import Highs
from derc.equivalence import Menu, Zoo, best_path, best_with, make_menu

KINDS = ("matrix", "sketch")


def random_zoo(seed: int, units: tuple[int, ...], blocks: int, epsilon: float, *, size: int = 40) -> Zoo:
    """A zoo with rows of length 1 that drift along depth, and the matrix of their products."""
    random = np.random.default_rng(seed)
    path = random.standard_normal((4, size))
    menus, rows = list[Menu](), list[np.ndarray]()
    for number, count in enumerate(units):
        before = np.concatenate([[0], np.cumsum(random.integers(1, 2000, count))]).astype(float)
        share = before / before[-1] * 3
        weight = np.maximum(0, 1 - np.abs(share[:, None] - np.arange(4)))
        rows.append(np.abs(weight @ path) + 0.5 * random.random((count + 1, size)))
        width = random.integers(1, 1000, count + 1).astype(float)
        menus.append(make_menu(f"d{number}", sum(map(len, rows[:-1])), before, width / width.max(), blocks, epsilon))
    made = np.concatenate(rows)
    unit = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return Zoo(tuple(menus), unit.astype(np.float64) @ unit.T.astype(np.float64), blocks, unit)


def matrix_of(zoo: Zoo) -> Zoo:
    return replace(zoo, rows=None)


def allowed(menu: Menu, blocks: int) -> list[tuple[int, ...]]:
    """Every allowed choice of one donor's cuts, by looking at all of them."""
    last = len(menu.before) - 1
    every = combinations(range(1, last), blocks - 1)
    return [
        cuts
        for cuts in every
        if all(menu.before[b] - menu.before[a] <= menu.limit for a, b in pairwise((0, *cuts, last)))
    ]


def pair_value(zoo: Zoo, choice: tuple[tuple[int, ...], ...]) -> float:
    """Σ over sets and donor pairs of s(in, in') + s(out, out'), term by term."""
    ends = [(0, *cuts, len(menu.width) - 1) for cuts, menu in zip(choice, zoo.menus, strict=True)]
    total = 0.0
    for a, b in combinations(range(len(ends)), 2):
        for k in range(zoo.blocks):
            total += block_value(zoo, a, b, (ends[a][k], ends[b][k])) + block_value(
                zoo, a, b, (ends[a][k + 1], ends[b][k + 1])
            )
    return total


def block_value(zoo: Zoo, a: int, b: int, cuts: tuple[int, int]) -> float:
    return float(zoo.similarity[zoo.menus[a].start + cuts[0], zoo.menus[b].start + cuts[1]])


def centre_value(zoo: Zoo, choice: tuple[tuple[int, ...], ...]) -> float:
    """Σ over sets of the largest summed S of one member's block with all others', term by term."""
    ends = [(0, *cuts, len(menu.width) - 1) for cuts, menu in zip(choice, zoo.menus, strict=True)]
    total = 0.0
    for k in range(zoo.blocks):
        sums = []
        for centre in range(len(ends)):
            sums.append(
                sum(
                    block_value(zoo, d, centre, (ends[d][k], ends[centre][k]))
                    + block_value(zoo, d, centre, (ends[d][k + 1], ends[centre][k + 1]))
                    for d in range(len(ends))
                    if d != centre
                )
            )
        total += max(sums)
    return total


def check_choice(zoo: Zoo, cuts: np.ndarray) -> None:
    """Every block has a unit at least and meets its bound; every set has one block of every donor."""
    assert cuts.shape == (len(zoo.menus), zoo.places)
    for menu, row in zip(zoo.menus, cuts, strict=True):
        ends = np.array([0, *row, len(menu.width) - 1])
        assert (np.diff(ends) >= 1).all()
        assert (np.diff(menu.before[ends]) <= menu.limit).all()


small = given(
    seed=st.integers(0, 10**6),
    units=st.lists(st.integers(4, 8), min_size=1, max_size=4).map(tuple),
    blocks=st.integers(1, 4),
    epsilon=st.sampled_from([0.0, 0.2, 1.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@small
def test_windows_are_exactly_what_allowed_choices_use(seed, units, blocks, epsilon) -> None:
    zoo = random_zoo(seed, units, blocks, epsilon)
    for menu in zoo.menus:
        every = np.array(allowed(menu, blocks))
        assert len(every)
        for j in range(blocks - 1):
            assert sorted(set(every[:, j])) == list(range(menu.low[j], menu.high[j] + 1))


@settings(max_examples=40, deadline=None, derandomize=True)
@small
def test_best_paths_against_enumeration(seed, units, blocks, epsilon) -> None:
    zoo = random_zoo(seed, units, blocks, epsilon)
    if zoo.places == 0:
        return
    worth = np.random.default_rng(seed).random(zoo.windows.cut.shape) - zoo.windows.dislike
    found, reach = best_path(worth, zoo.windows.barrier), best_with(worth, zoo.windows.barrier)
    for d, menu in enumerate(zoo.menus):
        values = {
            cuts: sum(worth[d, j, cut - menu.low[j]] for j, cut in enumerate(cuts)) for cuts in allowed(menu, blocks)
        }
        best = max(values, key=values.__getitem__)
        assert tuple(menu.low + found[d]) == best
        for j in range(zoo.places):
            for cut in range(menu.low[j], menu.high[j] + 1):
                want = max(value for cuts, value in values.items() if cuts[j] == cut)
                assert reach[d, j, cut - menu.low[j]] == pytest.approx(want)


@settings(max_examples=40, deadline=None, derandomize=True)
@small
def test_both_forms_and_the_program_against_enumeration(seed, units, blocks, epsilon) -> None:
    zoo = random_zoo(seed, units, blocks, epsilon)
    truth = max(pair_value(zoo, choice) for choice in product(*(allowed(menu, blocks) for menu in zoo.menus)))
    matrix = equivalence_search.search(matrix_of(zoo), 16, seed)
    sketch = equivalence_sketch.search(zoo, 16, seed)
    exact, bound = equivalence_program.solve(matrix_of(zoo), Highs(), 60)
    for cuts in (matrix, sketch, exact):
        check_choice(zoo, cuts)
    values = matrix_of(zoo).objective(np.stack([matrix, sketch, exact]))
    assert values[0] == pytest.approx(truth, abs=1e-6)
    assert values[1] >= 0.998 * truth - 1e-9
    assert values[2] == pytest.approx(truth, abs=1e-6)
    assert values[2] - 1e-6 <= bound <= truth + 1e-4
    np.testing.assert_allclose(zoo.objective(np.stack([matrix, sketch])), values[:2], rtol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    units=st.lists(st.integers(4, 7), min_size=1, max_size=4).map(tuple),
    blocks=st.integers(1, 3),
)
def test_centres_against_enumeration(seed, units, blocks) -> None:
    zoo = matrix_of(random_zoo(seed, units, blocks, 0.4))
    truth = max(centre_value(zoo, choice) for choice in product(*(allowed(menu, blocks) for menu in zoo.menus)))
    cuts, centres = equivalence_centres.search(zoo, 16, seed)
    check_choice(zoo, cuts)
    value = equivalence_centres.medoids(zoo, cuts)[1]
    assert value == pytest.approx(centre_value(zoo, tuple(map(tuple, cuts.tolist()))))
    assert value == pytest.approx(truth, abs=1e-6)
    assert centres.shape == (blocks,)


def test_sketched_sweeps_never_lose_and_donors_one_by_one_do_not_either() -> None:
    zoo = random_zoo(3, tuple(np.random.default_rng(0).integers(10, 40, 60)), 4, 0.2)
    sketch = equivalence_sketch.Sketch(zoo)
    choices = equivalence_search.drawn(zoo, 3, np.random.default_rng(1))
    values = [sketch.value(sketch.sums(choices))]
    for _ in range(6):
        choices = sketch.sweep(choices, sketch.sums(choices))
        values.append(sketch.value(sketch.sums(choices)))
    assert (np.diff(values, axis=0) >= -1e-9 * values[0]).all()
    polished = sketch.value(sketch.sums(sketch.polish(choices[0])[None]))[0]
    assert polished >= values[-1][0] * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_sketched_form_is_within_a_five_hundredth_of_the_matrix_form(seed: int) -> None:
    zoo = random_zoo(seed, tuple(np.random.default_rng(seed).integers(10, 61, 40)), 4, 0.2)
    matrix = equivalence_search.search(matrix_of(zoo), 16, seed)
    sketch = equivalence_sketch.search(zoo, 16, seed)
    values = matrix_of(zoo).objective(np.stack([matrix, sketch]))
    assert values[1] >= 0.998 * values[0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_cuts_give_way_to_the_narrower_and_twins_are_cut_alike(kind: str) -> None:
    zoo = random_zoo(0, (9, 9, 9), 3, 0.6)
    twin = zoo.menus[0]
    menus = tuple(replace(twin, name=f"d{i}", start=10 * i) for i in range(3))
    rows = np.concatenate([zoo.rows[:10]] * 3)
    same = Zoo(menus, np.ones((30, 30)), 3) if kind == "matrix" else Zoo(menus, np.zeros((0, 0)), 3, np.ones_like(rows))
    search = equivalence_search.search if kind == "matrix" else equivalence_sketch.search
    cuts = search(same, 16, 0)
    narrowest = min(allowed(twin, 3), key=lambda choice: sum(twin.width[list(choice)]))
    assert [tuple(row) for row in cuts] == [narrowest] * 3


def test_near_ties_are_those_that_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence_checks, "NEAR", 0.01)
    zoo = matrix_of(random_zoo(5, (14, 12, 16, 13, 15), 4, 0.5))
    cuts = equivalence_search.search(zoo, 16, 0)
    other = cuts.copy()
    menu = zoo.menus[2]
    window = [cut for cut in range(menu.low[1], menu.high[1] + 1) if cut != cuts[2, 1]]
    value, found = float(zoo.objective(cuts[None])[0]), 0
    for cut in window:
        other[2, 1] = cut
        choices = [choice for choice in allowed(menu, 4) if choice[1] == cut]
        best = max(zoo.objective(np.where(np.arange(5)[:, None] == 2, choice, cuts)[None])[0] for choice in choices)
        ties = equivalence_checks.near_ties(zoo, cuts, [other])
        assert bool(ties) == ((value - best) / value < equivalence_checks.NEAR)
        found += len(ties)
        for tie in ties:
            assert (tie.donor, tie.place, tie.cut, tie.other) == (2, 1, cuts[2, 1], cut)
            assert tie.loss == pytest.approx((value - best) / value, abs=1e-9)
    assert equivalence_checks.moved(cuts, [cuts, other]) == pytest.approx(1 / 15)
    assert equivalence_checks.near_ties(zoo, cuts, [cuts]) == ()
    assert 0 < found < len(window)


def test_sets_are_distinct_where_no_blocks_would_rather_change_places() -> None:
    zoo = random_zoo(2, (12, 15, 11, 14), 7, 0.9)
    cuts = equivalence_search.drawn(zoo, 1, np.random.default_rng(3))[0]
    cuts = equivalence_search.cut_numbers(zoo, cuts)
    ends = [(0, *row, len(menu.width) - 1) for row, menu in zip(cuts.tolist(), zoo.menus, strict=True)]

    def likeness(d: int, k: int, place: int) -> float:
        """Of donor d's block k to the others' blocks in a set."""
        return sum(
            block_value(zoo, d, e, (ends[d][k], ends[e][place]))
            + block_value(zoo, d, e, (ends[d][k + 1], ends[e][place + 1]))
            for e in range(4)
            if e != d
        )

    stays = np.ones((7, 4), bool)
    for d, k, other in product(range(4), range(7), range(7)):
        kept = likeness(d, k, k) + likeness(d, other, other)
        stays[k, d] &= kept >= likeness(d, k, other) + likeness(d, other, k) - 1e-9
    want = stays.mean(axis=1).min()
    assert 0 < want < 1
    assert equivalence_checks.distinctness(matrix_of(zoo), cuts) == pytest.approx(want)
    assert equivalence_checks.distinctness(zoo, cuts) == pytest.approx(want)


SCRIPT = """
import sys
import numpy as np
from derc import equivalence_search, equivalence_sketch, similarity
from tests.test_equivalence import matrix_of, random_zoo
zoo = random_zoo(9, (30, 41, 22, 37, 18, 55) * 4, 4, 0.2, size=300)
features = [np.random.default_rng(i).standard_normal((200, 300)).astype(np.float32) for i in range(30)]
alike = similarity.similarity(features)
print(equivalence_search.search(matrix_of(zoo), 16, 4).tolist(), equivalence_sketch.search(zoo, 16, 4).tolist())
print(np.round(alike, 5).tolist())
"""


def test_one_thread_and_two_give_the_same_answer() -> None:
    def run(threads: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        root = Path(__file__).parent.parent
        return subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert run("1") == run("2")
