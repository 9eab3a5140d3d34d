"""What the transfer benchmark's rows come to: pure computations, each row a budget of a task and a seed.

A row has held-out accuracies by name, as in `accuracy_figures`, and `place`, the task and its budget. `donor1` is the
best intact donor with its fitted head, `donor_recalibrated` the same in the state in which a compile gives it, `donor3`
and `donor4` that one trained for as many images as the assembly at these stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.accuracy_figures import Row, gains, kept, paper_wins, share, shortfall, spread, wins

EQUAL = {"stage1": "donor1", "stage2": "donor1", "stage3": "donor3", "stage4": "donor4"}
"""The intact donor that was trained as long as an assembly at a stage; matching shows no labels."""
OTHERS = {
    "stage1": ("donor_recalibrated", "random1", "paper1"),
    "stage2": ("donor_recalibrated", "paper2"),
    "stage3": ("random3", "paper3"),
    "stage4": ("random4", "paper4", "scratch", "distilled"),
}
PLACE = "place"


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """All of them; shares are over budgets and seeds of all tasks, gains and shortfalls are points, held out."""
    lost = [row for row in rows if row.get("stage1") is not None and row["stage1"] <= row["donor_recalibrated"]]
    by_place = gains(rows, "stage4", "donor4", PLACE).values()
    found = {
        "tasks": len({row["task"] for row in rows}),
        "budgets": len({row[PLACE] for row in rows}),
        "seeds": len({row["seed"] for row in rows}),
        "rows": len(rows),
        "assemblies": sum(row.get("stage1") is not None for row in rows),
        **{f"{stage}_retention": kept(rows, stage) for stage in EQUAL},
        **against_donors(rows),
        "stage4_wins_of_means": share(mean(gain) > 0 for gain in by_place),
        "stage4_below_by_more_than_spread": sum(-mean(gain) > spread(gain) for gain in by_place),
        "paper_protocol_wins": paper_wins(rows),
        **{f"{stage}_wins_{other}": wins(rows, stage, other) for stage, every in OTHERS.items() for other in every},
        "answers_intact": share(row["answer_intact"] for row in rows),
        "answers_intact_matched": share(row["matched_answer_intact"] for row in rows),
        "losses_known": share(row["answer_intact"] for row in lost),
        **by_task(rows),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def against_donors(rows: Sequence[Row]) -> dict[str, float]:
    """At each stage: wins over the equally trained donor, the mean gain, and the worst budget with its spread."""
    found: dict[str, float] = {}
    for stage, donor in EQUAL.items():
        loss, seeds = shortfall(rows, stage, donor, PLACE)
        found |= {f"{stage}_wins": wins(rows, stage, donor), f"{stage}_mean_gain": mean_gain(rows, stage, donor)}
        found |= {f"{stage}_worst_shortfall": loss, f"{stage}_worst_spread": seeds}
    return found


def mean_gain(rows: Sequence[Row], name: str, other: str) -> float:
    """Points that `name` is above `other` in the mean over all rows that have both, 0 where none has."""
    every = [gain for found in gains(rows, name, other, PLACE).values() for gain in found]
    return mean(every) if every else 0.0


def by_task(rows: Sequence[Row]) -> dict[str, float]:
    """Wins and mean gains of each task alone."""
    found: dict[str, float] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        for stage, donor in EQUAL.items():
            found[f"{task}_{stage}_wins"] = wins(here, stage, donor)
            found[f"{task}_{stage}_mean_gain"] = mean_gain(here, stage, donor)
    return found
