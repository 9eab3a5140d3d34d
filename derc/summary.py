"""The final report of a compile: held-out accuracies, manifest, and the bundle's files."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from derc import bundle, stitching
from derc.artifacts import Assembly, Emitted, Latency, LoweredZoo, Shipped
from derc.assembled import assemble, seeded
from derc.config import CompileSettings
from derc.data import Split
from derc.ir import Graph, Op, TensorType
from derc.judge import columns_of, correct, logits
from derc.pipeline import Context, Timings
from derc.report import render
from derc.search import Judged, Search
from derc.text import print_graph
from derc.version import VERSION


@dataclass(frozen=True)
class Outcome:
    """Everything that the final report is made from."""

    settings: CompileSettings
    command: str
    context: Context
    search: Search
    lowered: LoweredZoo
    chosen: Judged
    emitted: Emitted
    shipped: Shipped
    met: bool
    timings: Timings
    negligible: float


RESULT = ("status", "target", "budget", "selected", "latency", "accuracy", "solver", "parity", "timings_s", "artifacts")


def result(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that `derc compile --json` prints."""
    return {name: manifest[name] for name in RESULT}


def command_line(settings: CompileSettings) -> str:
    """The command that repeats this compile from any directory, the output left out."""
    return shlex.join(["derc", "compile", *_arguments(settings)])


def _arguments(settings: CompileSettings) -> list[str]:
    """The flags that give these settings, the output left out and paths made absolute."""
    result: list[str] = []
    for name, value in settings.model_dump(exclude={"output", "defaulted"}, exclude_none=True).items():
        if name == "data" and isinstance(value, str) and ":" in value:
            kind, _, path = value.partition(":")
            value = f"{kind}:{Path(path).absolute()}"
        elif name in ("zoo", "checkpoint") and Path(str(value)).is_file():
            value = str(Path(str(value)).absolute())
        result += [f"--{name.replace('_', '-')}", str(value)]
    return result


def summarise(outcome: Outcome, started: float) -> dict[str, Any]:
    """Write the bundle; returns its manifest with `artifacts`, the paths of its files."""
    start = time.perf_counter()
    accuracy = accuracies(outcome)
    first = outcome.search.cuts.donors[outcome.chosen.assembly.blocks[0].donor].cuts[0]
    manifest: dict[str, Any] = {
        "schema": bundle.SCHEMA,
        "derc": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "ok" if outcome.met else "over_budget",
        "command": outcome.command,
        "target": _target(outcome.context),
        "zoo": {"spec": outcome.settings.zoo, "negligible": outcome.negligible},
        "input": {"shape": list(first.type.shape), "range": [0, 1]},
        "budget": {n: getattr(outcome.settings, n) for n in ("latency_ms", "params_m", "macs_g", "memory_mb")},
        "selected": _selected(outcome),
        "latency": _latency(outcome),
        "accuracy": accuracy,
        "solver": _solver(outcome.search),
        "donors": _donors(outcome),
        "candidates": [_candidate(one, outcome) for one in outcome.search.judged.values()],
        "partition": _partition(outcome),
        "similarity": _similarity(outcome),
        "parity": asdict(outcome.shipped.parity),
        "placement": outcome.shipped.placement,
    }
    seconds = {**outcome.timings.seconds, "report": time.perf_counter() - start, "total": time.perf_counter() - started}
    manifest["timings_s"] = {name: round(value, 3) for name, value in seconds.items()}
    manifest["reused"] = sorted(name for name, reused in outcome.timings.reused.items() if reused)
    files = _files(outcome)
    listed = {**manifest, "files": {name: bundle.sha256(data) for name, data in sorted(files.items())}}
    files["report.html"] = render(listed).encode()
    output = Path(outcome.settings.output)
    sealed = bundle.write(output, files, manifest)
    return {**sealed, "artifacts": {name: str(output / name) for name in (*sorted(files), bundle.MANIFEST)}}


def _files(outcome: Outcome) -> dict[str, bytes]:
    emitted = outcome.emitted
    weights = {name: torch.from_numpy(value.copy()) for name, value in emitted.weights.items()}
    plan = plan_graph(outcome.chosen.assembly, outcome)
    plan.verify()
    return {
        "model.py": emitted.source.encode(),
        "weights.safetensors": save(weights),
        "model.onnx": emitted.onnx.tobytes(),
        f"engine{outcome.context.engine.suffix}": outcome.shipped.engine.tobytes(),
        "plan.txt": print_graph(plan).encode(),
        "reproduce.sh": _reproduce(outcome).encode(),
    }


def _reproduce(outcome: Outcome) -> str:
    lines = [
        "#!/bin/sh",
        f"# Compiles this bundle again with derc {VERSION}, into the directory given (default: reproduced).",
        f'{outcome.command} -o "${{1:-reproduced}}"',
    ]
    return "\n".join(lines) + "\n"


def plan_graph(assembly: Assembly, outcome: Outcome) -> Graph:
    """The assembly in the IR: blocks and stitches as operations."""
    donors = outcome.search.cuts.donors
    first = donors[assembly.blocks[0].donor].cuts[0]
    ops: list[Op] = []
    value = first.name
    for index, block in enumerate(assembly.blocks):
        donor = donors[block.donor]
        if index and assembly.stitched[index - 1]:
            before = assembly.blocks[index - 1]
            source, target = donors[before.donor].cuts[before.last].type, donor.cuts[block.first].type
            price = stitching.cost(source, target)
            ops.append(
                Op(
                    f"stitch{index}",
                    "stitch",
                    stitching.key(source, target),
                    (value,),
                    target,
                    price.params,
                    price.macs,
                    price.bytes,
                )
            )
            value = f"stitch{index}"
        units = donor.units[block.first : block.last]
        params, macs = sum(u.params for u in units), sum(u.macs for u in units)
        kind = donor.cuts[block.last].type
        ops.append(Op(f"block{index}", "block", str(block), (value,), kind, params, macs, 4 * kind.numel))
        value = f"block{index}"
    return Graph("assembly", first, tuple(ops), value, {"derc": VERSION})


def accuracies(outcome: Outcome) -> dict[str, Any]:
    """Validation and held-out accuracies of network, random-stitch baseline and donors; None without labels."""
    context, chosen = outcome.context, outcome.chosen
    data, assembly = context.data, chosen.assembly
    network = assemble(assembly, context.lowered, chosen.stitched.states)
    with seeded(context.seed):
        baseline = assemble(assembly, context.lowered)
    last = assembly.blocks[-1].donor
    donors = {name: _both(context.lowered[name].program, name, context) for name in outcome.search.select.heads}
    return {
        "validation": _accuracy(network, last, context, data.validation),
        "heldout": _accuracy(network, last, context, data.heldout),
        "random_stitch_heldout": None if assembly.intact else _accuracy(baseline, last, context, data.heldout),
        "donors": donors,
        "best_intact_within_budget": _best_intact(outcome, donors),
    }


def _both(network: nn.Module, name: str, context: Context) -> dict[str, float | None]:
    data = context.data
    return {split: _accuracy(network, name, context, getattr(data, split)) for split in ("validation", "heldout")}


def _accuracy(network: nn.Module, donor: str, context: Context, split: Split) -> float | None:
    if split.labels is None:
        return None
    right = correct(logits(network, split), split, columns_of(context.zoo[donor].labels, context.data))
    return None if right is None else float(right.mean())


def _best_intact(outcome: Outcome, donors: dict[str, dict[str, float | None]]) -> dict[str, Any] | None:
    """The intact donor within the budgets of the best score, by its last measurement."""
    fitting = sorted(outcome.search.fitting(intact=True), key=lambda one: one.scores.value)
    if not fitting:
        return None
    best = fitting[-1]
    name = best.assembly.blocks[0].donor
    return {
        "donor": name,
        "heldout": donors[name]["heldout"],
        "measured_ms": best.measured.ms if best.measured else None,
    }


def _target(context: Context) -> dict[str, Any]:
    target = context.target
    return {"name": target.name, "engine": context.engine.describe(), "batch": target.batch}


def _selected(outcome: Outcome) -> dict[str, Any]:
    assembly, chosen = outcome.chosen.assembly, outcome.chosen
    plan = plan_graph(assembly, outcome)
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
    source, _, target = op.target.partition(">")
    index = int(op.name.removeprefix("stitch"))
    return {
        "before": index,
        "source": source,
        "target": target,
        "params": op.params,
        "macs": op.macs,
        "residual": round(residual, 6),
    }


def _latency(outcome: Outcome) -> dict[str, Any]:
    latency = outcome.shipped.latency
    return {
        "predicted_ms": outcome.chosen.predicted["latency_ms"],
        "measured_ms": latency.ms,
        "ci95_ms": [latency.low_ms, latency.high_ms],
        "provenance": latency.provenance,
        "stable": latency.stable,
        "samples": latency.samples,
        "noise": outcome.shipped.noise,
    }


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


def _cut(name: str, kind: TensorType) -> str:
    return f"{name}: {stitching.describe(kind)}"


def _plain(latency: Latency) -> dict[str, Any]:
    return {name: getattr(latency, name) for name in ("ms", "low_ms", "high_ms", "provenance", "stable")}


def _candidate(one: Judged, outcome: Outcome) -> dict[str, Any]:
    return {
        "assembly": str(one.assembly),
        "intact": one.assembly.intact,
        "chosen": one.assembly == outcome.chosen.assembly,
        "validation": one.scores.value if one.scores.labelled else None,
        "agreement": None if one.scores.labelled else one.scores.value,
        "naswot": one.scores.naswot,
        "predicted_ms": one.predicted["latency_ms"],
        "measured_ms": one.measured.ms if one.measured else None,
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


def _similarity(outcome: Outcome) -> dict[str, Any]:
    embedded = outcome.search.embedded
    return {
        "estimator": embedded.estimator,
        "images": embedded.images,
        "index": [[cut.donor, cut.cut] for cut in embedded.index],
        "values": embedded.similarity.round(4).tolist(),
    }
