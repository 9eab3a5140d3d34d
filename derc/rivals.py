"""Several bundles' networks, trained alike: which of them may be compared, and which is the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from derc.artifacts import Array
from derc.errors import UsageError
from derc.finetuned import Finetuned
from derc.paired import ahead, chosen
from derc.training.score import correct

SIZES = {
    "params_m": ("params", 1e6, "M parameters"),
    "macs_g": ("macs", 1e9, "G MACs"),
    "memory_mb": ("memory_mb", 1, "MB"),
}
"""For each budget of size, the manifest's figure, its unit, and what that is called."""


def check(bundles: Sequence[tuple[Path, dict[str, Any]]], learns: Sequence[bool]) -> None:
    """Raise UsageError where bundles (path, manifest) cannot be held against the first one.

    They must be other bundles, for the same device, within the first one's budgets by what is known of them, and
    something of each must be trained (`learns`).
    """
    (first, manifest), *others = bundles
    seen = {manifest["seal"]: first}
    for (path, other), trains in zip(others, learns[1:], strict=True):
        if other["seal"] in seen:
            raise UsageError(f"--against {path} is the same bundle as {seen[other['seal']]}: give another one")
        seen[other["seal"]] = path
        if _device(other) != _device(manifest):
            raise UsageError(
                f"--against {path} is for {_device(other)}, and {first} for {_device(manifest)}: give a bundle for the "
                "same target, engine and batch size"
            )
        over = _over(other, manifest.get("budget") or {})
        if over:
            raise UsageError(f"--against {path} {over} of {first}: compile it within that budget")
        if not trains:
            raise UsageError(f"--against {path} would have nothing to train: give --freeze none or all-but-head")


def _device(manifest: dict[str, Any]) -> str:
    target = manifest["target"]
    engine = "/".join(filter(None, (target["engine"]["engine"], target["engine"].get("variant"))))
    return f"{target['name']} ({engine}, batch {target['batch']})"


def _over(manifest: dict[str, Any], budget: dict[str, Any]) -> str:
    """Which budget the network does not keep to, by what is known of it; empty where it keeps to all."""
    latency, limit = manifest["latency"], budget.get("latency_ms")
    highest = (latency.get("ci95_ms") or (None, None))[1]
    if limit is not None and highest is not None and highest > limit:
        return f"takes up to {highest:.3f} ms, over the budget of {limit:g} ms"
    for name, (figure, unit, what) in SIZES.items():
        value, limit = manifest["selected"].get(figure), budget.get(name)
        if limit is not None and value is not None and value / unit > limit:
            return f"has {value / unit:.3g} {what}, over the budget of {limit:g}"
    return ""


def answer(networks: Sequence[Finetuned], say: Callable[[str], None]) -> Finetuned:
    """The network to ship, within the first one's budgets; `say` gets why.

    It is the best on the validation images, but one of several donors' blocks replaces the best donor only where it is
    significantly ahead, as in a compile (docs/decisions/0003).
    """
    if len(networks) == 1:
        return networks[0]
    right = [correct(one.trained.network, one.data.validation, one.columns) for one in networks]
    best = place([one.trained.after.rank for one in networks], [_whole(one) for one in networks], right)
    for number, one in enumerate(networks):
        say(f"{_name(one)}: {int(right[number].sum())} of {len(right[number])} validation images right")
    say(f"{_name(networks[best])} is the answer")
    found = networks[best]
    record = {**found.record, "against": [_told(one, one is found) for one in networks]}
    return replace(found, manifest={**found.manifest, "budget": networks[0].manifest.get("budget")}, record=record)


def place(ranks: Sequence[tuple[float, float]], donors: Sequence[bool], right: Sequence[Array]) -> int:
    """The place of the answer among networks, of which some are `donors`, by `ranks` and the images answered right."""
    return chosen(ranks, donors, lambda one, other: ahead(right[one], right[other]))


def _whole(one: Finetuned) -> bool:
    """Whether the network is one donor from its first unit to its last, whatever its weights have become."""
    selected = one.manifest["selected"]
    return not selected["stitches"] and len({block["donor"] for block in selected["blocks"]}) == 1


def _name(one: Finetuned) -> str:
    return f"{one.parent} ({one.manifest['selected']['assembly']})"


def _told(one: Finetuned, kept: bool) -> dict[str, Any]:
    """What is recorded of each network that was trained."""
    trained = one.trained
    return {
        "path": str(one.parent.absolute()),
        "seal": one.manifest["seal"],
        "assembly": one.manifest["selected"]["assembly"],
        "validation": {"before": trained.before.accuracy, "after": trained.after.accuracy},
        "heldout": one.heldout,
        "images": trained.images,
        "seconds": round(trained.seconds, 3),
        "kept": kept,
    }
