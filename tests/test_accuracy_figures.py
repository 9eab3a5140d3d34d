"""The accuracy benchmark's figures, held against values by hand and a sum over many latencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy_figures import area, figures, gains, paper_wins, retention, shortfall, volume_gain, wins
from benchmarks.accuracy_rounds import answered


def row(seed: int, budget: float, **values: Any) -> dict[str, Any]:
    base = {"seed": seed, "budget_ms": budget, "donor_ms": budget, "assembly_ms": budget, "tail_intact": 0.8}
    named = {f"{name}_validation": value for name, value in values.items() if name.startswith(("stage", "donor"))}
    flags = {"answer_intact": True, "matched_answer_intact": False}
    return base | flags | named | values


ROWS = [
    row(0, 1.0, stage1=0.4, stage2=0.78, stage4=0.82, donor1=0.7, donor4=0.80, paper1=0.1, paper2=0.79, paper4=0.5),
    row(1, 1.0, stage1=0.6, stage2=0.76, stage4=0.80, donor1=0.7, donor4=0.84, paper1=0.1, paper2=0.3, paper4=0.5),
    row(0, 2.0, stage1=0.8, stage2=0.80, stage4=0.90, donor1=0.7, donor4=0.85),
    row(1, 2.0, donor1=0.7, donor4=0.85, stage1=None, stage2=None, stage4=None, paper1=0.2),
]


def test_retention_is_a_share_of_the_tail_donors_accuracy() -> None:
    assert retention(ROWS[0], "stage1") == pytest.approx(0.5)
    assert retention(ROWS[3], "stage1") is None
    found = figures(ROWS, ROWS, (1.0, 4.0))
    assert found["stage1_retention"] == pytest.approx((0.5 + 0.75 + 1.0) / 3, abs=1e-4)
    assert found["stage2_retention_budgets"] == pytest.approx(2 / 4)  # 0.975, 0.95, 1.0 and no assembly


def test_a_budget_without_an_assembly_is_no_win() -> None:
    assert wins(ROWS, "stage4", "donor4") == pytest.approx(2 / 4)
    assert figures(ROWS, ROWS, (1.0, 4.0))["stage4_wins_of_means"] == pytest.approx(1 / 2)


def test_the_worst_budget_is_that_of_the_lowest_mean() -> None:
    assert gains(ROWS, "stage4", "donor4")[1.0] == pytest.approx([2.0, -4.0])
    loss, spread = shortfall(ROWS, "stage4", "donor4")
    assert loss == pytest.approx(1.0)
    assert spread == pytest.approx(np.std([2.0, -4.0], ddof=1))
    assert figures(ROWS, ROWS, (1.0, 4.0))["stage4_below_by_more_than_spread"] == 0
    assert shortfall(ROWS[2:3], "stage4", "donor4") == (0.0, 0.0)


def test_wins_over_the_paper_count_stages_that_it_has() -> None:
    assert paper_wins(ROWS) == pytest.approx(5 / 7)  # stage 2 of the first is below, the last has no assembly


def brute(points: list[tuple[float, float, float]], fastest: float, slowest: float) -> float:
    """The mean over many latencies of what a choice by validation among all that is fast enough reports."""
    count = 100_000
    grid = np.exp(
        np.linspace(np.log(fastest), np.log(slowest), count, endpoint=False) + 0.5 * np.log(slowest / fastest) / count
    )
    best = np.zeros(count)
    chosen = np.full(count, -1.0)
    for ms, validation, heldout in points:
        better = (grid >= ms) & (validation > chosen)
        best[better], chosen[better] = heldout, validation
    return float(best.mean())


@pytest.mark.parametrize("seed", range(8))
def test_the_area_is_that_of_a_sum_over_latencies(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = [(float(a), float(b), float(c)) for a, b, c in random.uniform((0.5, 0, 0), (9, 1, 1), (12, 3))]
    assert area(points, 1.0, 8.0) == pytest.approx(brute(points, 1.0, 8.0), abs=1e-4)


def test_networks_chosen_on_validation_images_may_lower_the_area() -> None:
    good = [(1.0, 0.5, 0.8)]
    assert area(good, 1.0, 4.0) == pytest.approx(0.8)
    assert area([*good, (2.0, 0.6, 0.4)], 1.0, 4.0) == pytest.approx(0.6)
    assert area([], 1.0, 4.0) == 0.0


def test_the_volume_gain_is_the_mean_over_seeds() -> None:
    rows = [row(0, 1.0, stage4=0.9, donor4=0.8), row(1, 2.0, stage4=0.7, donor4=0.8)]
    assert volume_gain(rows, rows, ("stage4", "donor4"), (1.0, 4.0)) == pytest.approx(5.0)  # 10 points, and none


def test_a_trained_assembly_is_kept_where_it_is_significantly_ahead() -> None:
    def item(right: list[int]) -> dict[str, Any]:
        bits = np.packbits(np.array(right, bool)).tobytes().hex()
        return {"validation": float(np.mean(right)), "heldout": 0.5 + np.mean(right) / 100, "right": bits}

    donor = item([1] * 20 + [0] * 20)
    one_ahead, far_ahead = item([1] * 19 + [0] + [1] * 2 + [0] * 18), item([1] * 30 + [0] * 10)
    assert answered({"stage4": one_ahead, "donor4": donor})["answer4_of"] == "donor4"
    found = answered({"stage4": far_ahead, "donor4": donor})
    assert found == {"answer4": far_ahead["heldout"], "answer4_validation": 0.75, "answer4_of": "stage4"}
    assert answered({"donor4": donor})["answer4"] == donor["heldout"]
