"""Tables of the accuracy benchmark: held-out accuracies by budget, and what each stage costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.accuracy_figures import Row, spread

COLUMNS = {
    "donor1": "best donor",
    "donor_recalibrated": "recalibrated",
    "donor4": "tuned",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "stage3": "stage 3",
    "stage4": "stage 4",
    "answer4": "kept",
    "random4": "random stitches",
    "paper1": "paper 1",
    "paper2": "paper 2",
    "paper3": "paper 3",
    "paper4": "paper 4",
    "scratch": "from scratch",
    "distilled": "distilled",
}


def table(rows: Sequence[Row]) -> str:
    """Held-out accuracy in per cent, mean ± spread over seeds, by budget."""
    lines = [f"| ms | {' | '.join(COLUMNS.values())} |", f"|{' --- |' * (len(COLUMNS) + 1)}"]
    for budget in sorted({row["budget_ms"] for row in rows}):
        here = [row for row in rows if row["budget_ms"] == budget]
        cells = [cell([row[name] for row in here if row.get(name) is not None]) for name in COLUMNS]
        lines.append(f"| {budget:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def networks(rows: Sequence[Row]) -> str:
    """What was compared at each budget and seed, and whether a compile would have returned the intact donor."""
    lines = ["| ms | seed | best intact donor | best assembly | answer | answer after matching |", f"|{' --- |' * 6}"]
    for row in sorted(rows, key=lambda one: (one["budget_ms"], one["seed"])):
        name = (row.get("name") or "–").replace(" | ", " + ")
        answers = ["donor" if row[key] else "assembly" for key in ("answer_intact", "matched_answer_intact")]
        lines.append(f"| {row['budget_ms']:.3f} | {row['seed']} | {row['donor']} | {name} | {' | '.join(answers)} |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """Mean ± spread in per cent, a dash for nothing."""
    if not values:
        return "–"
    return f"{100 * mean(values):.1f}" + (f" ± {100 * spread(values):.1f}" if len(values) > 1 else "")


def costs(rows: Sequence[Row]) -> str:
    """Training images shown to reach each state from the one before, and mean seconds, of one network."""
    lines = ["| state | images shown | seconds |", "| --- | --- | --- |"]
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("assembly") is not None:
            found.setdefault("stage2", []).append((row["match_images"], row["match_seconds"]))
        for name, cost in row["costs"].items():
            if cost["images"]:
                found.setdefault(name, []).append((cost["images"], cost["seconds"]))
    for name in dict.fromkeys(("stage2", *COLUMNS, *found)):
        if name in found:
            images, seconds = zip(*dict.fromkeys(found[name]), strict=True)
            lines.append(f"| {name} | {max(images)} | {mean(seconds):.1f} |")
    return "\n".join(lines)
