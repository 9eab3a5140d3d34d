"""A plot of best values so far, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any

COLOURS = {
    "derc": "#0b6e4f",
    "derc_random_design": "#5fbf9f",
    "published": "#c0392b",
    "evolution": "#8e6bbf",
    "random": "#8a8a8a",
}
WIDTH, HEIGHT, MARGIN = 460, 300, 46


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """A panel for each instance: medians over seeds of the best value so far against evaluations, on a log axis."""
    names = list(dict.fromkeys(row["instance"] for row in rows))
    panels = [panel([row for row in rows if row["instance"] == name], name, place) for place, name in enumerate(names)]
    width, height = WIDTH * min(len(names), 2), HEIGHT * ((len(names) + 1) // 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n'
    )


def panel(rows: Sequence[dict[str, Any]], name: str, place: int) -> str:
    """One instance's curves, the optimum or the targets' median as a dashed line."""
    curves = {method: middle([row["curves"][method] for row in rows]) for method in COLOURS}
    most = max(len(curve) for curve in curves.values())
    values = [value for curve in curves.values() for value in curve[4:]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def at(number: float, value: float) -> str:
        x = MARGIN + (WIDTH - 1.5 * MARGIN) * math.log(number) / math.log(most)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (min(max(value, low), high) - low) / span
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{MARGIN}" y="20" font-size="13">{name}: best value so far (median of {len(rows)} seeds)</text>']
    for number, (method, curve) in enumerate(curves.items()):
        points = " ".join(at(i, value) for i, value in enumerate(curve, 1))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[method]}" stroke-width="1.8"/>')
        y = HEIGHT - MARGIN - 12 * (len(curves) - number)
        parts.append(f'<text x="{WIDTH - 150}" y="{y}" fill="{COLOURS[method]}">{method.replace("_", " ")}</text>')
    target = median(row["target"] for row in rows)
    ends = at(1, target).split(","), at(most, target).split(",")
    parts.append(
        f'<line x1="{ends[0][0]}" y1="{ends[0][1]}" x2="{ends[1][0]}" y2="{ends[1][1]}" stroke="#c0392b" '
        'stroke-dasharray="4 3"/>'
    )
    for tick in (1, 10, 100, most):
        x = at(tick, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{tick}</text>')
    for value in (low, (low + high) / 2, high):
        y = at(1, value).split(",")[1]
        parts.append(f'<text x="{MARGIN - 4}" y="{y}" text-anchor="end">{value:.4g}</text>')
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 10}" text-anchor="middle">networks stitched and scored</text>')
    return f'<g transform="translate({WIDTH * (place % 2)} {HEIGHT * (place // 2)})">{"".join(parts)}</g>'


def middle(curves: Sequence[Sequence[float]]) -> list[float]:
    """The median over curves of the best so far; a curve that ended keeps its last."""
    best = [list(accumulate(curve, max)) for curve in curves]
    most = max(map(len, best))
    return [median(curve[min(i, len(curve) - 1)] for curve in best) for i in range(most)]
