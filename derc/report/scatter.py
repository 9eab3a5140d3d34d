"""The two scatter plots: latency against accuracy, and predicted against measured latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from derc.report import quantities
from derc.report.axes import Axis, fit
from derc.report.labels import Box, Label, place
from derc.report.quantities import known


@dataclass(frozen=True)
class Point:
    """A mark at pixel (x, y); `kind` is donor, candidate or chosen; hollow where its latency is not measured."""

    x: float
    y: float
    kind: str
    measured: bool
    title: str
    label: Label | None = None


@dataclass(frozen=True)
class Tradeoff:
    """Latency against accuracy; `budget` is the pixel of the latency budget, `omitted` counts candidates left out."""

    x: Axis
    y: Axis
    ylabel: str
    points: list[Point]
    budget: float | None
    budget_text: str
    omitted: int
    donors_omitted: int


@dataclass(frozen=True)
class Pair:
    """One network's predicted and measured latency in milliseconds."""

    name: str
    kind: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


@dataclass(frozen=True)
class Calibration:
    """Predicted against measured, with the same axis both ways so that equality is the diagonal."""

    x: Axis
    y: Axis
    points: list[Point]
    pairs: list[Pair]
    median: float
    lowest: float
    highest: float


def tradeoff(manifest: Mapping[str, Any]) -> Tradeoff | None:
    """Donors and candidates by latency and accuracy, or None where nothing has both.

    Accuracy is on the validation split; without labels, candidates' agreement with the task donors.
    """
    candidates = manifest.get("candidates") or []
    field = "validation" if any(known(c.get("validation")) for c in candidates) else "agreement"
    donors = _donors(manifest)
    if donors:
        field = "validation"
    ours = [mark for mark in (_candidate(c, field) for c in candidates) if mark is not None]
    marks = sorted(donors + ours, key=lambda mark: ("candidate", "donor", "chosen").index(mark[2].kind))
    if not marks:
        return None
    budget = (manifest.get("budget") or {}).get("latency_ms")
    limit = [budget] if known(budget) and budget > 0 else []
    x = fit([ms for ms, *_ in marks] + limit, 66, 842)
    y = fit([score for _, score, *_ in marks], 356, 22, linear=True)
    points = [replace(point, x=x.at(ms), y=y.at(score)) for ms, score, point, _ in marks]
    texts = [text for *_, text in marks]
    return Tradeoff(
        x=x,
        y=y,
        ylabel="validation accuracy" if field == "validation" else "agreement with the task donors",
        points=_labelled(points, texts, Box(66, 22, 842, 356)),
        budget=x.at(limit[0]) if limit else None,
        budget_text=f"budget {quantities.milliseconds(budget)}",
        omitted=len(candidates) - len(ours),
        donors_omitted=len(manifest.get("donors") or {}) - len(donors),
    )


def calibration(manifest: Mapping[str, Any]) -> Calibration | None:
    """Candidates, intact donors among them, that have both a predicted and a measured latency."""
    pairs = [
        Pair(c.get("assembly") or quantities.DASH, _kind(c), c["predicted_ms"], c["measured_ms"])
        for c in manifest.get("candidates") or []
        if all(known(c.get(key)) and c[key] > 0 for key in ("predicted_ms", "measured_ms"))
    ]
    if not pairs:
        return None
    values = [value for pair in pairs for value in (pair.predicted, pair.measured)]
    x, y = fit(values, 60, 400), fit(values, 360, 20)
    points = [
        Point(
            x.at(p.predicted),
            y.at(p.measured),
            p.kind,
            True,
            f"{p.name}: {p.ratio:.2f} = {p.measured:.4g} ms measured / {p.predicted:.4g} ms predicted",
        )
        for p in pairs
    ]
    ratios = [pair.ratio for pair in pairs]
    return Calibration(x, y, points, pairs, median(ratios), min(ratios), max(ratios))


Mark = tuple[float, float, Point, str]


def _donors(manifest: Mapping[str, Any]) -> list[Mark]:
    accuracies = (manifest.get("accuracy") or {}).get("donors") or {}
    marks: list[Mark] = []
    for name, donor in (manifest.get("donors") or {}).items():
        latency, score = donor.get("latency") or {}, (accuracies.get(name) or {}).get("validation")
        ms, word = latency.get("ms"), latency.get("provenance") or "measured"
        if known(ms) and ms > 0 and known(score):
            title = f"{name}: {quantities.milliseconds(ms)} {word}, validation {quantities.percent(score)}"
            marks.append((ms, score, Point(0, 0, "donor", word == "measured", title), name))
    return marks


def _candidate(candidate: Mapping[str, Any], field: str) -> Mark | None:
    measured = known(candidate.get("measured_ms"))
    ms, score = candidate.get("measured_ms" if measured else "predicted_ms"), candidate.get(field)
    if not known(ms) or ms <= 0 or not known(score):
        return None
    word = "measured" if measured else "predicted"
    title = (
        f"{candidate.get('assembly')}: {quantities.milliseconds(ms)} {word}, {field} {quantities.percent(score)}, "
        f"NASWOT {quantities.plain(candidate.get('naswot'))}"
    )
    kind = "chosen" if candidate.get("chosen") else "candidate"
    return ms, score, Point(0, 0, kind, measured, title), "chosen" if kind == "chosen" else ""


def _kind(candidate: Mapping[str, Any]) -> str:
    if candidate.get("chosen"):
        return "chosen"
    return "donor" if candidate.get("intact") else "candidate"


def _labelled(points: list[Point], texts: list[str], frame: Box) -> list[Point]:
    wanted = sorted((i for i, text in enumerate(texts) if text), key=lambda i: points[i].kind)
    obstacles = [(point.x, point.y) for point in points]
    places = place([(points[i].x, points[i].y, texts[i][:28]) for i in wanted], obstacles, frame)
    found = dict(zip(wanted, places, strict=True))
    return [replace(point, label=found.get(i)) for i, point in enumerate(points)]
