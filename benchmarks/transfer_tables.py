"""Tables of the transfer benchmark: held-out accuracies by task and budget, what was compared, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.accuracy_figures import Row
from benchmarks.accuracy_tables import cell, costs

COLUMNS = {
    "donor1": "donor",
    "donor_recalibrated": "as compiled",
    "donor3": "tuned as stage 3",
    "donor4": "tuned as stage 4",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "stage3": "stage 3",
    "stage4": "stage 4",
    "random3": "random 3",
    "random4": "random 4",
    "paper1": "paper 1",
    "paper2": "paper 2",
    "paper3": "paper 3",
    "paper4": "paper 4",
    "scratch": "scratch",
    "distilled": "distilled",
}


def table(rows: Sequence[Row]) -> str:
    """Held-out accuracy in per cent, mean ± spread over seeds, by task and budget."""
    lines = [f"| task | M MACs | {' | '.join(COLUMNS.values())} |", f"|{' --- |' * (len(COLUMNS) + 2)}"]
    for task, budget in dict.fromkeys((row["task"], row["m_macs"]) for row in rows):
        here = [row for row in rows if (row["task"], row["m_macs"]) == (task, budget)]
        cells = [cell([row[name] for row in here if row.get(name) is not None]) for name in COLUMNS]
        lines.append(f"| {task} | {budget:.4g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def networks(rows: Sequence[Row]) -> str:
    """What was compared at each budget and seed, and whether a compile would have returned the intact donor."""
    lines = ["| task | M MACs | seed | best intact donor | best assembly | answer | matched |", f"|{' --- |' * 7}"]
    for row in rows:
        name = (row.get("name") or "–").replace(" | ", " + ")
        answers = ["donor" if row[key] else "assembly" for key in ("answer_intact", "matched_answer_intact")]
        cells = [row["task"], f"{row['m_macs']:.4g}", str(row["seed"]), row["donor"], name, *answers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spent(rows: Sequence[Row]) -> str:
    """Images shown and seconds of each training, by task."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return "\n\n".join(f"{task}:\n\n{costs([row for row in rows if row['task'] == task])}" for task in tasks)
