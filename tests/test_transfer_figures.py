"""The transfer benchmark's figures, held against values by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy_figures import shortfall
from benchmarks.transfer import named
from benchmarks.transfer_figures import against_donors, by_task, figures, mean_gain
from benchmarks.transfer_tables import networks, table
from benchmarks.transfer_tasks import FULL, QUICK


def row(task: str, budget: float, seed: int, **values: Any) -> dict[str, Any]:
    base = {"task": task, "m_macs": budget, "place": f"{task} {budget:g}", "seed": seed, "donor": "one"}
    return base | {"tail_intact": 0.8, "answer_intact": True, "matched_answer_intact": False} | values


ROWS = [
    row("a", 1.0, 0, donor1=0.7, donor_recalibrated=0.74, donor3=0.8, donor4=0.9, stage1=0.72, stage3=0.82, stage4=0.8),
    row("a", 1.0, 1, donor1=0.7, donor_recalibrated=0.70, donor3=0.8, donor4=0.8, stage1=0.68, stage3=0.78, stage4=0.9),
    row("b", 1.0, 0, donor1=0.6, donor_recalibrated=0.60, donor3=0.6, donor4=0.7, stage1=0.80, stage3=0.80, stage4=0.6),
    row("b", 1.0, 1, donor1=0.6, donor_recalibrated=0.60, donor3=0.6, donor4=0.7, stage1=None, stage3=None),
]
ROWS[1]["answer_intact"] = False
ROWS[2] |= {"answer_intact": False, "paper1": 0.5, "paper3": 0.9, "random4": 0.5, "scratch": 0.6, "distilled": 0.7}


def test_equal_budgets_of_two_tasks_are_two_places() -> None:
    found = figures(ROWS)
    assert (found["tasks"], found["budgets"], found["seeds"], found["rows"], found["assemblies"]) == (2, 2, 2, 4, 3)


def test_each_stage_is_held_against_the_equally_trained_donor() -> None:
    found = against_donors(ROWS)
    assert found["stage1_wins"] == pytest.approx(2 / 4)  # a row without an assembly is no win
    assert found["stage3_wins"] == pytest.approx(2 / 4)
    assert found["stage4_wins"] == pytest.approx(1 / 4)
    assert found["stage1_mean_gain"] == pytest.approx((2 - 2 + 20) / 3)
    assert found["stage4_mean_gain"] == pytest.approx((-10 + 10 - 10) / 3)


def test_the_worst_budget_is_that_of_the_lowest_mean_and_has_its_seeds_spread() -> None:
    assert shortfall(ROWS, "stage4", "donor4", "place") == pytest.approx((10.0, 0.0))
    assert figures(ROWS)["stage4_below_by_more_than_spread"] == 1
    assert shortfall(ROWS[:2], "stage4", "donor4", "place") == pytest.approx((0.0, 200**0.5))
    assert (
        figures(ROWS)["stage4_wins_of_means"] == 0.0
    )  # no gain of points on average in one place, a loss in the other


def test_wins_over_others_and_over_what_a_compile_makes_of_the_donor() -> None:
    found = figures(ROWS)
    assert found["stage1_wins_donor_recalibrated"] == pytest.approx(1 / 4)
    assert found["paper_protocol_wins"] == pytest.approx(1 / 2)  # stage 1 is above, stage 3 below
    assert found["stage4_wins_random4"] == pytest.approx(1 / 4)
    assert found["stage4_wins_scratch"] == found["stage4_wins_distilled"] == 0.0


def test_a_loss_is_known_where_the_compile_gives_the_donor() -> None:
    assert figures(ROWS)["losses_known"] == pytest.approx(1 / 2)  # lost twice, and once the donor was given
    assert figures(ROWS)["answers_intact"] == pytest.approx(2 / 4)


def test_tasks_have_figures_of_their_own() -> None:
    found = by_task(ROWS)
    assert found["a_stage1_mean_gain"] == pytest.approx(0.0)
    assert found["b_stage1_wins"] == pytest.approx(1 / 2)
    assert mean_gain([], "stage1", "donor1") == 0.0


def test_no_rows_give_figures_too() -> None:
    assert figures([])["stage4_wins"] == 0.0


def test_amounts_are_named_by_what_they_are() -> None:
    found = named("a", {"budget_ms": 1.5, "donor_ms": 1.25, "seed": 0})
    assert found == {"task": "a", "m_macs": 1.5, "place": "a 1.5", "donor_m_macs": 1.25, "seed": 0}


def test_tables_have_a_line_for_each_budget_and_for_each_row() -> None:
    assert table(ROWS).count("\n") == 1 + 2 and "| a | 1 | 70.0 ± 0.0 |" in table(ROWS)
    assert networks(ROWS).count("\n") == 1 + 4


def test_both_plans_have_the_same_tasks() -> None:
    assert list(FULL) == list(QUICK)
