"""What the page may claim: only a measured latency meets or misses a latency budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from derc.report import quantities
from derc.report.quantities import known

LIMITS = (
    ("latency", "latency_ms", "latency", 1.0, quantities.milliseconds),
    ("parameters", "params_m", "params", 1e6, quantities.count),
    ("MACs", "macs_g", "macs", 1e9, quantities.count),
    ("memory", "memory_mb", "memory_mb", 1.0, quantities.megabytes),
)


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, bad or open (nothing was promised or nothing is proved)."""

    tone: str
    text: str


@dataclass(frozen=True)
class Goal:
    """One quantity against its limit; `share` is value / limit, None where either is not known."""

    name: str
    value: str
    limit: str
    share: float | None
    provenance: str


def latency_of(manifest: Mapping[str, Any]) -> tuple[float | None, str]:
    """The chosen network's latency in milliseconds, and whether it is measured, recorded or predicted."""
    latency = manifest.get("latency") or {}
    if known(latency.get("measured_ms")):
        return latency["measured_ms"], latency.get("provenance") or "measured"
    if known(latency.get("recorded_ms")):
        return latency["recorded_ms"], "recorded"
    if known(latency.get("predicted_ms")):
        return latency["predicted_ms"], "predicted"
    return None, ""


def goals(manifest: Mapping[str, Any]) -> list[Goal]:
    """Latency, parameters, MACs and memory of the chosen network against their limits."""
    budget, selected = manifest.get("budget") or {}, manifest.get("selected") or {}
    latency, provenance = latency_of(manifest)
    found = []
    for name, key, field, scale, show in LIMITS:
        value = latency if field == "latency" else selected.get(field)
        limit = budget[key] * scale if known(budget.get(key)) else None
        share = value / limit if known(value) and limit else None
        found.append(Goal(name, show(value), show(limit), share, provenance if field == "latency" else ""))
    return found


def verdict(manifest: Mapping[str, Any]) -> Verdict:
    """One line for the top of the page."""
    if not (manifest.get("selected") or {}).get("blocks"):
        return Verdict("open", "Nothing was built")
    limited = [goal for goal in goals(manifest) if goal.limit != quantities.DASH]
    over = [goal.name for goal in limited if goal.share is not None and goal.share > 1]
    if manifest.get("status") == "over_budget" or over:
        return Verdict("bad", f"Over the {' and '.join(over)} budget" if over else "Over budget")
    if not limited:
        return Verdict("open", "Built without a budget")
    unknown = [goal.name for goal in limited if goal.share is None]
    if unknown:
        return Verdict("open", f"Built; its {' and '.join(unknown)} is not known")
    if limited[0].name == "latency" and limited[0].provenance != "measured":
        return Verdict("open", f"Latency budget not proved: {limited[0].provenance}, not measured")
    if limited[0].name == "latency" and (manifest.get("latency") or {}).get("stable") is False:
        return Verdict("open", "Within budget, but the measurement did not settle")
    return Verdict("good", "Within budget")


def gain(manifest: Mapping[str, Any]) -> str:
    """Held-out accuracy over the best intact donor's within the budget, in points."""
    accuracy = manifest.get("accuracy") or {}
    ours, theirs = accuracy.get("heldout"), (accuracy.get("best_intact_within_budget") or {}).get("heldout")
    if known(ours) and known(theirs):
        return f"{100 * (ours - theirs):+.1f} points".replace("-", "\N{MINUS SIGN}")
    return quantities.DASH
