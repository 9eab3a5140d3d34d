"""What the accuracy benchmark's rows come to: pure computations, each row a budget of a seed.

A row has held-out accuracies by name, None where nothing fits: `stage1` … `stage4` of the assembly, `tail_intact` of
the donor of its last block, `donor1` and `donor4` of the best intact donor as it is and tuned, `answer4` of the better
of `stage4` and `donor4` by the images that choose, and the baselines;
`<name>_validation` are the accuracies that choose. Latencies are in ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

Row = dict[str, Any]
Point = tuple[float, float, float]
"""Latency in ms, the accuracy that chooses, and the one that is reported."""
KEPT = 0.97
"""The share of the tail donor's accuracy that counts as kept."""
PAPER = {"stage1": "paper1", "stage2": "paper2", "stage3": "paper3", "stage4": "paper4"}


def retention(row: Row, stage: str) -> float | None:
    """The share of its tail donor's held-out accuracy that an assembly keeps."""
    return None if row.get(stage) is None else float(row[stage] / row["tail_intact"])


def kept(rows: Sequence[Row], stage: str) -> float:
    """Mean retention over the rows that have an assembly."""
    found = [value for row in rows if (value := retention(row, stage)) is not None]
    return mean(found) if found else 0.0


def share(flags: Iterable[bool]) -> float:
    """The share of what is true, 0 of nothing."""
    found = list(flags)
    return sum(found) / len(found) if found else 0.0


def gains(rows: Sequence[Row], name: str, other: str, place: str = "budget_ms") -> dict[Any, list[float]]:
    """By budget, `name` − `other` in points for every seed that has both; `place` is the field of the budget."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row.get(name) is not None and row.get(other) is not None:
            found.setdefault(row[place], []).append(100 * (row[name] - row[other]))
    return found


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def wins(rows: Sequence[Row], name: str, other: str) -> float:
    """The share of all rows, those that lack one of the two included, in which `name` is above `other`."""
    return share(row.get(name) is not None and row.get(other) is not None and row[name] > row[other] for row in rows)


def shortfall(rows: Sequence[Row], name: str, other: str, place: str = "budget_ms") -> tuple[float, float]:
    """The largest mean loss of a budget in points, 0 where there is none, and the seeds' spread there."""
    every = gains(rows, name, other, place)
    if not every:
        return 0.0, 0.0
    worst = min(every.values(), key=mean)
    return max(0.0, -mean(worst)), spread(worst)


def below(rows: Sequence[Row], name: str, other: str) -> int:
    """At how many budgets the mean loss is larger than the seeds' spread."""
    return sum(-mean(gain) > spread(gain) for gain in gains(rows, name, other).values())


def area(points: Iterable[Point], fastest: float, slowest: float) -> float:
    """Mean over log latency of the reported accuracy of the best by choice among all that is fast enough, else 0."""
    rows = sorted(point for point in points if point[0] <= slowest)
    total, best = 0.0, (-1.0, 0.0)
    for place, (ms, chosen, reported) in enumerate(rows):
        best = max(best, (chosen, reported))
        end = rows[place + 1][0] if place + 1 < len(rows) else slowest
        total += best[1] * float(np.log(max(end, fastest)) - np.log(max(ms, fastest)))
    return total / float(np.log(slowest / fastest))


def points(rows: Iterable[Row], name: str, latency: str) -> list[Point]:
    """The rows' networks that have the accuracy `name`, with their validation accuracy, each once."""
    there = [row for row in rows if row.get(name) is not None]
    return list(dict.fromkeys((row[latency], row[f"{name}_validation"], row[name]) for row in there))


def volume_gain(rows: Sequence[Row], donors: Sequence[Row], names: tuple[str, str], ends: tuple[float, float]) -> float:
    """Points of the front's area between two latencies that assemblies add to donors, mean over the donors' seeds.

    `names` are the state of the assemblies and that of the donors.
    """
    found, (fastest, slowest) = [], ends
    for seed in sorted({row["seed"] for row in donors}):
        without = points((row for row in donors if row["seed"] == seed), names[1], "donor_ms")
        both = without + points((row for row in rows if row["seed"] == seed), names[0], "assembly_ms")
        found.append(100 * (area(both, fastest, slowest) - area(without, fastest, slowest)))
    return mean(found) if found else 0.0


def paper_wins(rows: Sequence[Row]) -> float:
    """The share of rows and stages at which an assembly is above the paper's protocol at as many images shown."""
    return share(
        row.get(mine) is not None and row[mine] > row[theirs]
        for row in rows
        for mine, theirs in PAPER.items()
        if row.get(theirs) is not None
    )


def figures(rows: Sequence[Row], donors: Sequence[Row], ends: tuple[float, float]) -> dict[str, float]:
    """All of them, for budgets between two latencies; shares are over budgets and seeds, points are held out."""
    worst, seeds = shortfall(rows, "stage4", "donor4")
    answer_worst, answer_seeds = shortfall(rows, "answer4", "donor4")
    by_budget = gains(rows, "stage4", "donor4").values()
    lost = [row for row in rows if row.get("stage1") is not None and row["stage1"] <= row["donor1"]]
    found = {
        "budgets": len({row["budget_ms"] for row in rows}),
        "seeds": len({row["seed"] for row in rows}),
        "assemblies": sum(row.get("stage1") is not None for row in rows),
        **{f"{stage}_retention": kept(rows, stage) for stage in ("stage1", "stage2", "stage3", "stage4")},
        "stage2_retention_budgets": share((retention(row, "stage2") or 0.0) >= KEPT for row in rows),
        "stage4_wins": wins(rows, "stage4", "donor4"),
        "stage4_wins_of_means": sum(mean(gain) > 0 for gain in by_budget) / max(1, len({r["budget_ms"] for r in rows})),
        "stage4_worst_shortfall": worst,
        "stage4_worst_spread": seeds,
        "stage4_below_by_more_than_spread": below(rows, "stage4", "donor4"),
        "answer4_wins": wins(rows, "answer4", "donor4"),
        "answer4_losses": wins(rows, "donor4", "answer4"),
        "answer4_worst_shortfall": answer_worst,
        "answer4_worst_spread": answer_seeds,
        "answer4_below_by_more_than_spread": below(rows, "answer4", "donor4"),
        "hypervolume_gain": volume_gain(rows, donors, ("stage4", "donor4"), ends),
        "hypervolume_gain_as_compiled": volume_gain(rows, donors, ("stage1", "donor1"), ends),
        "paper_protocol_wins": paper_wins(rows),
        **{f"paper_protocol_wins_{stage}": wins(rows, stage, other) for stage, other in PAPER.items()},
        **{f"stage4_wins_{other}": wins(rows, "stage4", other) for other in ("random4", "scratch", "distilled")},
        "stage1_wins": wins(rows, "stage1", "donor1"),
        "stage1_wins_recalibrated": wins(rows, "stage1", "donor_recalibrated"),
        "stage2_wins": wins(rows, "stage2", "donor1"),
        "answers_intact": share(row["answer_intact"] for row in rows),
        "answers_intact_matched": share(row["matched_answer_intact"] for row in rows),
        "losses_known": share(row["answer_intact"] for row in lost),
    }
    return {name: round(float(value), 4) for name, value in found.items()}
