"""The manifest of a bundle, from the outcome of its compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from derc import bundle, stitching
from derc.artifacts import FittedHead, Latency, LatencyTable, Matched, Partition, Shipped
from derc.config import BUDGETS, LOWER_BUDGETS
from derc.engine import parse
from derc.ir import Op, TensorType
from derc.outcome import Outcome, accuracies, plan_graph
from derc.pipeline import Context
from derc.search import Judged, Search
from derc.version import VERSION


def manifest_of(outcome: Outcome) -> dict[str, Any]:
    """The manifest without timings and files."""
    first = outcome.search.cuts.donors[outcome.chosen.assembly.blocks[0].donor].cuts[0]
    return {
        "schema": bundle.SCHEMA,
        "derc": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "unmeasured" if outcome.met is None else "ok" if outcome.met else "over_budget",
        "command": outcome.command,
        "target": target_of(outcome.context),
        "zoo": {
            "spec": outcome.settings.zoo,
            "negligible": outcome.negligible,
            "input_size": outcome.settings.size,
            "left_out": dict(outcome.context.zoo.left_out),
        },
        "input": {"shape": list(first.type.shape), "range": [0, 1]},
        "emit": outcome.settings.emit,
        "budget": {n: getattr(outcome.settings, n) for n in (*BUDGETS, *LOWER_BUDGETS, "max_blocks")},
        "objective": outcome.settings.objective,
        "selected": _selected(outcome),
        "latency": latency_of(outcome.shipped, _predicted(outcome.chosen, outcome.search.table)),
        "prediction": _prediction(outcome.search.table),
        "accuracy": accuracies(outcome),
        **_heads(outcome),
        "recalibrated": len(outcome.context.data.probe) if any(outcome.chosen.stitched.buffers) else None,
        "matching": matching(outcome.chosen),
        "solver": _solver(outcome.search),
        "donors": _donors(outcome),
        "candidates": [_candidate(one, outcome) for one in outcome.search.judged.values()],
        "failed": {str(assembly): why for assembly, why in outcome.search.failed.items()},
        "partition": _partition(outcome),
        "equivalence": _equivalence(outcome.search.partition),
        "similarity": _similarity(outcome),
        "parity": asdict(outcome.shipped.parity),
        "placement": outcome.shipped.placement,
    }


def target_of(context: Context) -> dict[str, Any]:
    """The device, its engine and the batch size."""
    target = context.target
    name, variant = parse(target.engine)
    absent = {"engine": name, "threads": str(target.threads), **({"variant": variant} if variant else {})}
    described = context.engine.describe() if target.present else absent
    return {
        "name": target.name,
        "file": target.file,
        "engine": described,
        "batch": target.batch,
        "present": target.present,
    }


def _selected(outcome: Outcome) -> dict[str, Any]:
    assembly, chosen = outcome.chosen.assembly, outcome.chosen
    plan = plan_graph(assembly, outcome.search.cuts.donors)
    blocks = [op for op in plan.ops if op.kind == "block"]
    stitches = [op for op in plan.ops if op.kind == "stitch"]
    residuals = chosen.stitched.residual
    return {
        "assembly": str(assembly),
        "intact": assembly.intact,
        "blocks": [
            {**asdict(block), "params": op.params, "macs": op.macs}
            for block, op in zip(assembly.blocks, blocks, strict=True)
        ],
        "stitches": [_stitch(op, residual) for op, residual in zip(stitches, residuals, strict=True)],
        "params": plan.params,
        "macs": plan.macs,
        "memory_mb": chosen.predicted["memory_mb"],
    }


def _stitch(op: Op, residual: float) -> dict[str, Any]:
    source, target, form = stitching.parted(op.target)
    index = int(op.name.removeprefix("stitch"))
    return {
        "before": index,
        "source": source,
        "target": target,
        "form": form.name,
        "params": op.params,
        "macs": op.macs,
        "residual": round(residual, 6),
    }


def latency_of(shipped: Shipped, predicted_ms: float | None) -> dict[str, Any]:
    """What was measured of the shipped engine, or is recorded of the network, beside what was predicted."""
    latency = shipped.latency
    return {
        "predicted_ms": predicted_ms,
        "measured_ms": latency.ms if latency.provenance == "measured" else None,
        "recorded_ms": latency.ms if latency.provenance == "recorded" else None,
        "ci95_ms": [latency.low_ms, latency.high_ms],
        "provenance": latency.provenance,
        "stable": latency.stable,
        "samples": latency.samples,
        "noise": shipped.noise,
        "anchor_ms": shipped.anchor.ms,
    }


def _prediction(table: LatencyTable) -> dict[str, Any]:
    """How far predictions of whole networks were off, each by the others: quantiles of predicted / measured − 1."""
    errors = np.array(list(table.errors.values()))
    quantiles = (
        {f"q{q}": round(float(np.quantile(errors, q / 100)), 4) for q in (5, 25, 50, 75, 95)} if len(errors) else {}
    )
    return {
        "networks": len(errors),
        "median_abs_error": round(float(np.median(np.abs(errors))), 4) if len(errors) else None,
        "error_quantiles": quantiles,
        "failed": dict(table.failed),
    }


def _predicted(one: Judged, table: LatencyTable) -> float | None:
    """The prediction in ms; of a network that the table measured whole, the one that the others give."""
    error = table.errors.get(str(one.assembly))
    whole = {str(network.assembly): network.latency for network in table.networks}.get(str(one.assembly))
    if one.assembly.intact:
        whole = table.donors.get(one.assembly.blocks[0].donor)
    return one.predicted["latency_ms"] if error is None or whole is None else whole.ms * (1 + error)


def _solver(search: Search) -> dict[str, Any]:
    found = search.selection
    names = ("status", "objective", "bound", "gap")
    return {
        "name": found.solver if found else search.context.solver.name,
        **{name: getattr(found, name) if found else None for name in names},
        "evaluations": search.spent,
    }


def _donors(outcome: Outcome) -> dict[str, Any]:
    context, table = outcome.context, outcome.search.table
    result = {}
    for donor in context.zoo.donors:
        graph = outcome.lowered.graphs[donor.name]
        latency = table.donors.get(donor.name)
        result[donor.name] = {
            "factory": donor.factory,
            "source": donor.source,
            "licence": donor.licence,
            "sha256": donor.digest(),
            "params": graph.params,
            "macs": graph.macs,
            "cuts": [_cut(cut.name, cut.type) for cut in outcome.search.cuts.donors[donor.name].cuts],
            "task": donor.name in outcome.search.select.heads,
            "latency": _plain(latency) if latency else None,
        }
    return result


def _heads(outcome: Outcome) -> dict[str, Any]:
    """How heads were fitted to the data's labels; nothing where donors' own ones know them."""
    context, chosen = outcome.context, outcome.chosen
    donors = {donor.name: donor.head for donor in context.zoo.donors if donor.head is not None}
    if not donors:
        return {}
    own = chosen.stitched.head or donors.get(chosen.assembly.blocks[-1].donor)
    network = None if own is None else {**_fitted(own), "validation": chosen.scores.accuracy}
    found = {name: _fitted(head) for name, head in donors.items()}
    return {"head": {"classes": list(context.data.classes or ()), "network": network, "donors": found}}


def _fitted(head: FittedHead) -> dict[str, Any]:
    """`left_out` is the accuracy on images that were left out of the fit in turn."""
    return {
        "layer": head.path,
        "features": head.weight.shape[1],
        "method": head.method,
        "strength": head.strength,
        "images": head.images,
        "left_out": round(head.accuracy, 6),
    }


def matching(one: Judged) -> dict[str, Any] | None:
    """What training without labels did to a network; None where there was none."""
    matched = one.matched
    if matched is None:
        return None
    before = one.unmatched or one.scores
    validation = {"before": before.accuracy, "after": one.scores.accuracy} if before.labelled else None
    return matching_of(matched, validation, kept=one.unmatched is not None)


def matching_of(matched: Matched, validation: Mapping[str, float | None] | None, *, kept: bool) -> dict[str, Any]:
    """What was shown and what came of it; `validation` is the accuracy there before and after."""
    return {
        "teacher": matched.teacher,
        "images": matched.images,
        "distinct": matched.distinct,
        "seconds": matched.seconds,
        "agreement": {"of": "features" if matched.features else "answers"}
        | {"before": round(matched.before, 6), "after": round(matched.after, 6)},
        "validation": None if validation is None else dict(validation),
        "statistics": matched.statistics,
        "kept": kept,
        "note": matched.note,
    }


def _cut(name: str, kind: TensorType) -> str:
    return f"{name}: {stitching.describe(kind)}"


def _plain(latency: Latency) -> dict[str, Any]:
    return {name: getattr(latency, name) for name in ("ms", "low_ms", "high_ms", "provenance", "stable")}


def _candidate(one: Judged, outcome: Outcome) -> dict[str, Any]:
    return {
        "assembly": str(one.assembly),
        "intact": one.assembly.intact,
        "chosen": one.assembly == outcome.chosen.assembly,
        "validation": one.scores.accuracy if one.scores.labelled else None,
        "agreement": None if one.scores.labelled else one.scores.accuracy,
        "naswot": one.scores.naswot,
        "objective": one.scores.accuracy if one.scores.estimate is None else one.scores.estimate,
        "predicted_ms": _predicted(one, outcome.search.table),
        "measured_ms": one.measured.ms if one.measured and one.measured.provenance == "measured" else None,
        "recalibrated": any(one.stitched.buffers),
        "matching": matching(one),
    }


def _partition(outcome: Outcome) -> dict[str, Any]:
    donors = outcome.search.cuts.donors
    return {
        name: [
            {
                "first": b.first,
                "last": b.last,
                "set": b.set,
                "macs": sum(u.macs for u in donors[name].units[b.first : b.last]),
            }
            for b in blocks
        ]
        for name, blocks in outcome.search.partition.blocks.items()
    }


def _equivalence(partition: Partition) -> dict[str, Any]:
    """What is known of the partition as a whole: its objective, how far from the best, how sure its cuts are."""
    names = ("objective", "bound", "gap", "moved", "distinct")
    return {
        **{name: getattr(partition, name) for name in names},
        "centres": list(partition.centres),
        "near_ties": [asdict(tie) for tie in partition.near_ties],
    }


def _similarity(outcome: Outcome) -> dict[str, Any]:
    embedded = outcome.search.embedded
    return {
        "estimator": embedded.estimator,
        "images": embedded.images,
        "index": [[cut.donor, cut.cut] for cut in embedded.index],
        "values": embedded.similarity.round(4).tolist(),
    }
