"""The bundle of a recipe: its manifest, and the same files that a compile writes."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from derc import bundle, stitching
from derc.artifacts import BlockRef, CutDonor, Joint, StitchedAssembly
from derc.assembled import live
from derc.assembling import Built
from derc.config import BUDGETS
from derc.data import Split
from derc.donor import Donor
from derc.ir import Graph
from derc.judge import columns_of, correct, logits
from derc.manifest import latency_of, matching_of, target_of
from derc.outcome import plan_graph
from derc.parts import Part
from derc.summary import network_files, reproduce, write_network
from derc.version import VERSION

RESULT = ("status", "target", "selected", "latency", "accuracy", "parity", "timings_s", "artifacts")


def result(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that `derc assemble --json` prints."""
    return {name: manifest[name] for name in RESULT}


def write(built: Built, seconds: float) -> dict[str, Any]:
    """Write the bundle; returns its manifest with `artifacts`, the paths of its files."""
    start = time.perf_counter()
    manifest = manifest_of(built)
    manifest["timings_s"] = {"total": round(seconds + time.perf_counter() - start, 3)}
    return write_network(built.settings.output, _files(built), manifest)


def graph_of(built: Built) -> Graph:
    """The plan in the IR, with notes on where the weights come from."""
    context = built.context
    cuts = {name: CutDonor(one.cuts, one.units) for name, one in context.lowered.items()}
    graph = plan_graph(built.stitched.assembly, cuts)
    notes = {part.name: weights_of(part, built) for part in built.parts if not isinstance(part.spec, BlockRef)}
    donors = {f"donor/{donor.name}": _origin(donor) for donor in context.zoo.donors}
    return replace(graph, notes={**graph.notes, **notes, **donors})


def weights_of(part: Part, built: Built) -> str:
    """Where the weights of what derc adds come from: matched, fitted, or random; an identity has none."""
    if isinstance(part.spec, Joint) and not part.spec.weighed:
        return "none"
    if built.matched is not None and part.kind != "head":
        return "matched"
    return "fitted" if part.name in built.fitted else "random"


def _origin(donor: Donor) -> str:
    """Where a donor's weights come from."""
    if donor.weights is not None:
        return donor.weights.name
    return "pretrained" if donor.pretrained else "none: as the factory makes it under seed 0"


def manifest_of(built: Built) -> dict[str, Any]:
    """The manifest without timings and files."""
    context, shipped = built.context, built.shipped
    plan = graph_of(built)
    return {
        "schema": bundle.SCHEMA,
        "derc": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "ok",
        "command": built.command,
        "target": target_of(context),
        "zoo": {"spec": built.settings.zoo, "negligible": 0.0, "input_size": built.settings.size or built.recipe.size},
        "recipe": built.recipe.model_dump(mode="json"),
        "data": context.data.name,
        "input": {"shape": list(built.parts[0].source.shape), "range": [0, 1]},
        "budget": dict.fromkeys(BUDGETS),
        "selected": _selected(built, plan),
        "latency": {**latency_of(shipped, None), "anchor": built.anchor},
        "accuracy": _accuracies(built),
        "matching": _matching(built),
        "donors": {donor.name: _donor(donor, built) for donor in context.zoo.donors},
        "parity": asdict(shipped.parity),
        "placement": shipped.placement,
    }


def _selected(built: Built, plan: Graph) -> dict[str, Any]:
    assembly = built.stitched.assembly
    costs = {op.name: {"params": op.params, "macs": op.macs} for op in plan.ops}
    found: dict[str, Any] = {"assembly": str(assembly), "intact": assembly.intact, "blocks": [], "stitches": []}
    for part in built.parts:
        match part.spec:
            case BlockRef():
                found["blocks"].append({**asdict(part.spec), **costs[part.name]})
            case Joint():
                found["stitches"].append({**_stitch(part, built), **costs[part.name]})
            case _:
                found[part.kind] = {"kind": str(part.spec), "weights": weights_of(part, built), **costs[part.name]}
    return {**found, "params": plan.params, "macs": plan.macs}


def _stitch(part: Part, built: Built) -> dict[str, Any]:
    residual = built.fitted.get(part.name)
    return {
        "before": int(part.name.removeprefix("stitch")),
        **(_joint(part.spec) if isinstance(part.spec, Joint) else {}),
        "source": stitching.describe(part.source),
        "target": stitching.describe(part.target),
        "weights": weights_of(part, built),
        "residual": None if residual is None else round(residual, 6),
    }


def _joint(joint: Joint) -> dict[str, Any]:
    return {**asdict(joint), "form": joint.form.name if joint.kind == "linear" else None}


def _donor(donor: Donor, built: Built) -> dict[str, Any]:
    graph = built.context.lowered[donor.name].graph
    return {
        "factory": donor.factory,
        "source": donor.source,
        "licence": donor.licence,
        "weights": _origin(donor),
        "input_size": list(donor.input_size),
        "sha256": donor.digest(),
        "params": graph.params,
        "macs": graph.macs,
    }


def _accuracies(built: Built) -> dict[str, Any]:
    """Accuracies of the network as it is, without training; None without labels or with a fresh head."""
    data = built.context.data
    splits = {"validation": data.validation, "heldout": data.heldout}
    return {name: _accuracy(built, built.stitched, split) for name, split in splits.items()}


def _matching(built: Built) -> dict[str, Any] | None:
    """What training without labels did to the network; None where there was none."""
    if built.matched is None:
        return None
    split = built.context.data.validation
    before, after = (_accuracy(built, one, split) for one in (built.unmatched, built.stitched))
    return matching_of(built.matched, None if before is None else {"before": before, "after": after}, kept=True)


def _accuracy(built: Built, stitched: StitchedAssembly, split: Split) -> float | None:
    assembly, context = stitched.assembly, built.context
    columns = columns_of(context.zoo[assembly.blocks[-1].donor].labels, context.data)
    if split.labels is None or columns is None or assembly.head is not None:
        return None
    network = live(stitched, context.lowered)
    right = correct(logits(network, split), split, columns)
    return None if right is None else float(right.mean())


def _files(built: Built) -> dict[str, bytes]:
    return {
        **network_files(built.emitted, built.shipped, built.context.engine.suffix, graph_of(built)),
        "recipe.toml": Path(built.path).read_bytes(),
        "reproduce.sh": reproduce("Assembles", built.command),
    }
