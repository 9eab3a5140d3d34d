"""The similarity matrix of all pairs of cuts as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from derc.report import palette, quantities
from derc.report.quantities import known

SIDE, LEFT, TOP = 640.0, 150.0, 8.0
TITLES_UP_TO = 120
NAME_WIDTH = 20


@dataclass(frozen=True)
class Cell:
    column: int
    colour: str
    title: str


@dataclass(frozen=True)
class Group:
    """A donor's run of cuts: `start` and `middle` in pixels from the matrix's corner."""

    donor: str
    name: str
    start: float
    middle: float


@dataclass(frozen=True)
class Tick:
    at: float
    text: int


@dataclass(frozen=True)
class Heatmap:
    """Rows of cells of `step` pixels; titles only up to 120 cuts, so that the page stays small."""

    rows: list[list[Cell]]
    groups: list[Group]
    ticks: list[Tick]
    step: float
    titled: bool
    ramp: tuple[str, ...] = palette.RAMP
    side: float = SIDE
    left: float = LEFT
    top: float = TOP


def heatmap(manifest: Mapping[str, Any]) -> Heatmap | None:
    """The figure, or None where there is no matrix."""
    similarity = manifest.get("similarity") or {}
    index, values = similarity.get("index") or [], similarity.get("values") or []
    if not index or len(values) != len(index):
        return None
    names = [_cut_name(manifest, donor, cut) for donor, cut in index]
    titled = len(index) <= TITLES_UP_TO
    rows = [
        [
            Cell(column, _colour(value), f"{names[row]} × {names[column]}: {_shown(value)}" if titled else "")
            for column, value in enumerate(line)
        ]
        for row, line in enumerate(values)
    ]
    step = SIDE / len(index)
    every = max(1, round(15 / step))
    ticks = [Tick(round((row + 0.5) * step, 2), cut) for row, (_, cut) in enumerate(index) if cut % every == 0]
    return Heatmap(rows, _groups([donor for donor, _ in index], step), ticks, step, titled)


def _groups(donors: list[str], step: float) -> list[Group]:
    groups, start = [], 0
    for donor, run in groupby(donors):
        length = len(list(run))
        name = donor if len(donor) <= NAME_WIDTH else donor[: NAME_WIDTH - 1] + "…"
        groups.append(Group(donor, name, round(start * step, 2), round((start + length / 2) * step, 2)))
        start += length
    return groups


def _cut_name(manifest: Mapping[str, Any], donor: str, cut: int) -> str:
    cuts = ((manifest.get("donors") or {}).get(donor) or {}).get("cuts") or []
    return f"{donor} cut {cut} ({cuts[cut]})" if 0 <= cut < len(cuts) else f"{donor} cut {cut}"


def _colour(value: Any) -> str:
    return palette.shade(value) if known(value) else "#9a9a9a"


def _shown(value: Any) -> str:
    return f"{value:.2f}" if known(value) else quantities.DASH
