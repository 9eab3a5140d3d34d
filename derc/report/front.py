"""The plot of a Pareto front: a picture that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from derc.report import quantities
from derc.report.axes import Axis, fit
from derc.report.labels import Box, place

WIDTH, HEIGHT = 860, 420
FRAME = Box(66, 22, 842, 356)
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.tick{fill:#555}.grid{stroke:#e4e4e4}.axis{stroke:#888}"
    ".front{fill:none;stroke:#0072b2;stroke-width:1.5}.intact{fill:none;stroke:#9a9a9a;stroke-dasharray:4 3}"
    ".donor{fill:#fff;stroke:#222;stroke-width:1.5}.assembly{fill:#0072b2;fill-opacity:.35}"
    ".assembly.best{fill-opacity:1}.donor.best{fill:#e69f00}"
)


def draw(told: Mapping[str, Any]) -> str:
    """An SVG of latency against score: donors, assemblies, the front, and the front of the intact donors alone."""
    rows = told["networks"]
    x = fit([row["ms"] for row in rows], FRAME.left, FRAME.right)
    y = fit([row["score"] for row in rows], FRAME.bottom, FRAME.top, linear=True)
    lines = [*_axes(x, y, told["score"])]
    lines += [_stairs(x, y, [r for r in rows if r["intact"]], "intact"), _stairs(x, y, rows, "front")]
    lines += [_mark(x, y, row) for row in sorted(rows, key=lambda row: (row["intact"], row["front"]))]
    lines += _labels(x, y, rows)
    lines.append(_legend(told))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = f"<title>Latency against {escape(told['score'])} on {escape(told['target'])}</title>"
    return (
        "\n".join(
            [head, title, f"<style>{STYLE}</style>", f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *lines]
        )
        + "\n</svg>\n"
    )


def _axes(x: Axis, y: Axis, score: str) -> list[str]:
    top, bottom, left, right = FRAME.top, FRAME.bottom, FRAME.left, FRAME.right
    lines = []
    for tick in x.ticks:
        at = x.at(tick)
        lines.append(f'<path class="grid" d="M{at} {top}V{bottom}"/>')
        lines.append(f'<text class="tick" x="{at}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in (tick for tick in y.ticks if tick <= 1):
        at = y.at(tick)
        lines.append(f'<path class="grid" d="M{left} {at}H{right}"/>')
        lines.append(f'<text class="tick" x="{left - 8}" y="{at + 4}" text-anchor="end">{100 * tick:g} %</text>')
    lines.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}" fill="none"/>')
    word = "latency, ms (logarithmic)" if x.log else "latency, ms"
    middle = (top + bottom) / 2
    lines.append(f'<text class="tick" x="{(left + right) / 2}" y="{bottom + 40}" text-anchor="middle">{word}</text>')
    turned = f'transform="translate(14 {middle}) rotate(-90)"'
    lines.append(f'<text class="tick" {turned} text-anchor="middle">{escape(score)}</text>')
    return lines


def _stairs(x: Axis, y: Axis, rows: list[dict[str, Any]], kind: str) -> str:
    """The best score within each latency, as a stair up to the right edge."""
    path, best = "", -1.0
    for row in rows:
        if row["score"] > best:
            at = x.at(row["ms"])
            path += f"H{at}V{y.at(row['score'])}" if path else f"M{at} {y.at(row['score'])}"
            best = row["score"]
    return f'<path class="{kind}" d="{path}H{FRAME.right}"/>' if path else ""


def _mark(x: Axis, y: Axis, row: Mapping[str, Any]) -> str:
    kind = ("donor" if row["intact"] else "assembly") + (" best" if row["front"] else "")
    score, told = quantities.percent(row["score"]), row["matching"]
    matched = f", matched, {quantities.percent(told['score_before'])} before" if told and told["kept"] else ""
    title = f"{row['spans']}: {quantities.milliseconds(row['ms'])} {row['provenance']}, {score}{matched}"
    at = f'cx="{x.at(row["ms"])}" cy="{y.at(row["score"])}"'
    return f'<circle class="{kind}" {at} r="{5 if row["intact"] else 4}"><title>{escape(title)}</title></circle>'


def _labels(x: Axis, y: Axis, rows: list[dict[str, Any]]) -> list[str]:
    donors = [row for row in rows if row["intact"]]
    obstacles = [(x.at(row["ms"]), y.at(row["score"])) for row in rows]
    wanted = [(x.at(row["ms"]), y.at(row["score"]), row["spans"].partition("[")[0][:28]) for row in donors]
    return [
        f'<text x="{label.x}" y="{label.y}" text-anchor="{label.anchor}">{escape(label.text)}</text>'
        for label in place(wanted, obstacles, FRAME)
        if label
    ]


def _legend(told: Mapping[str, Any]) -> str:
    provenances = sorted({row["provenance"] for row in told["networks"] if row["front"]})
    words = (
        "circles: intact donors; discs: assemblies; lines: the front and, dashed, that of the intact donors; "
        f"latencies of the front are {' and '.join(provenances)}"
    )
    return f'<text class="tick" x="{FRAME.left}" y="{HEIGHT - 6}">{words}</text>'
