"""Plots of the accuracy benchmark as SVG: accuracies by budget, and the fronts with and without assemblies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from benchmarks.accuracy_figures import Row, spread
from benchmarks.accuracy_tables import COLUMNS

Place = Callable[[float, float], tuple[float, float]]
WIDTH, HEIGHT, MARGIN = 620, 400, 50
COLOURS = {
    "stage1": "#9fd8c4",
    "stage2": "#5fbf9f",
    "stage3": "#2e9571",
    "stage4": "#0b5138",
    "donor1": "#c9a227",
    "donor4": "#b4541a",
    "distilled": "#7a4a8c",
    "random4": "#4a7fb5",
    "paper4": "#c0392b",
    "scratch": "#8a8a8a",
}
TRAINED = ("stage4", "donor4", "distilled", "random4", "paper4", "scratch")
UNTRAINED = ("stage1", "stage2", "stage3", "stage4", "donor1", "donor4")


def plots(rows: Sequence[Row], ends: tuple[float, float]) -> dict[str, str]:
    """File names and their SVG: the stages beside the donors, and everything at equal training."""
    return {
        "accuracy_stages.svg": plot(rows, UNTRAINED, ends, "stages and the best intact donor"),
        "accuracy_trained.svg": plot(rows, TRAINED, ends, "everything after as many images shown"),
    }


def plot(rows: Sequence[Row], names: Sequence[str], ends: tuple[float, float], title: str) -> str:
    """Held-out accuracy against the budget on a log axis, mean over seeds with their spread as bars."""
    series = {name: middle(rows, name) for name in names}
    values = [value for one in series.values() for value, _ in one.values()] or [0.0, 1.0]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    x0, x1 = math.log(ends[0]), math.log(ends[1])

    def at(ms: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - MARGIN - 130) * (math.log(ms) - x0) / (x1 - x0)
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low or 1.0)

    parts = [f'<text x="{MARGIN}" y="22" font-size="13">Held-out accuracy: {title}</text>']
    for step in range(round(10 * (high - low)) + 1):
        value = low + step / 10
        _, y = at(ends[0], value)
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - 130}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * value:.0f}%</text>')
    for budget in sorted({row["budget_ms"] for row in rows}):
        x, _ = at(budget, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{budget:.2g}</text>')
    for number, (name, found) in enumerate(series.items()):
        parts += curve(found, at, COLOURS[name])
        x, y = WIDTH - 120, MARGIN + 16 * number
        parts.append(f'<text x="{x}" y="{y}" fill="{COLOURS[name]}">{COLUMNS[name]}</text>')
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 12}" text-anchor="middle">latency budget in ms (log)</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def middle(rows: Sequence[Row], name: str) -> dict[float, tuple[float, float]]:
    """Mean and spread over seeds by budget."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row.get(name) is not None:
            found.setdefault(row["budget_ms"], []).append(row[name])
    return {budget: (mean(values), spread(values)) for budget, values in sorted(found.items())}


def curve(found: Mapping[float, tuple[float, float]], at: Place, colour: str) -> list[str]:
    """A line through the means, a dot at each, and a bar of the seeds' spread."""
    dots = [at(budget, value) for budget, (value, _) in found.items()]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    for (x, y), (budget, (value, width)) in zip(dots, found.items(), strict=True):
        (_, top), (_, bottom) = at(budget, value + width), at(budget, value - width)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
    return parts
