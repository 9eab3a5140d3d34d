"""The bundle of a fine-tuned network: emitted, built, verified and measured as a compile's, and put in its place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from derc import bundle, exporting
from derc.artifacts import Array, Assembly, BlockRef
from derc.completing import aimed_at, build_bundle, opened, used_in
from derc.console import Console
from derc.deployed import CALIBRATION_IMAGES, batches, same_opset
from derc.engine import Engine
from derc.errors import OverBudgetError, UsageError
from derc.passes.package import Package, check, coarsest, compare, outputs, plain_run
from derc.printing import merged
from derc.summary import reproduce, write_network
from derc.training.checkpoint import Work
from derc.training.data import TrainingData
from derc.training.examples import Examples, scaled
from derc.training.logs import as_csv
from derc.training.outcome import Trained
from derc.version import VERSION

RESULT = (
    "status",
    "target",
    "budget",
    "selected",
    "latency",
    "accuracy",
    "finetune",
    "parity",
    "timings_s",
    "artifacts",
)
KEPT = ("plan.txt", "recipe.toml")
"""Files that are the same for the trained network."""
DROPPED = ("files", "seal", "artifacts", "timings_s", "reused", "built", "finetune", "lineage")
"""What of the parent's manifest is not the new one's."""
LOG, BLOCKS_LOG = "log.csv", "blockwise.csv"


@dataclass(frozen=True)
class Finetuned:
    """A trained network, the bundle that it came from, and what is recorded of it.

    `heldout` are the accuracies before and after; `labels` the names of the outputs, None where they are not known;
    `float32` drops the lower precisions of the engine's blocks; `columns` are the outputs that stand for the classes.
    """

    parent: Path
    manifest: dict[str, Any]
    command: str
    record: dict[str, Any]
    trained: Trained
    heldout: dict[str, float]
    data: TrainingData
    labels: tuple[str, ...] | None
    output: Path
    float32: bool
    columns: tuple[int, ...] | None = None


def result(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that `derc finetune --json` prints."""
    return {name: manifest.get(name) for name in RESULT}


def publish(made: Finetuned, work: Work, measure_s: float, started: float, console: Console) -> dict[str, Any]:
    """Write the new bundle, whole or not at all, and remove the work folder; returns the manifest.

    Raises what emission, parity and `build_bundle` raise; OverBudgetError after the bundle was written.
    """
    scratch, images = work.folder / "bundle", first(made.data.validation, Package().more_images)
    shutil.rmtree(scratch, ignore_errors=True)
    with console.status("emit"):
        model = onnx_of(made)
        write_network(scratch, _files(made, model), _manifest(made, model, images))
    failure: OverBudgetError | None = None
    if aimed_at(made.manifest).present:
        try:
            build_bundle(scratch, measure_s, console, images)
        except OverBudgetError as error:
            failure = error
    manifest = _moved(scratch, made, started)
    work.remove()
    if failure is not None:
        raise OverBudgetError(str(failure).replace(str(scratch), str(made.output))) from failure
    return manifest


def _moved(scratch: Path, made: Finetuned, started: float) -> dict[str, Any]:
    """Write the bundle at `scratch` to the output, in one step."""
    found = bundle.verify(scratch)
    files = {name: (scratch / name).read_bytes() for name in found["files"] if name != "report.html"}
    manifest = {name: value for name, value in found.items() if name not in ("files", "seal")}
    seconds = {"training": made.trained.seconds, "total": time.perf_counter() - started}
    manifest["timings_s"] = {name: round(value, 3) for name, value in seconds.items()}
    return write_network(made.output, files, manifest)


def first(images: Examples, count: int) -> Array:
    """The first images (n, C, H, W), float32 in [0, 1]."""
    found: Array = scaled(images.read(np.arange(min(count, len(images))))).numpy()
    return found


def onnx_of(made: Finetuned) -> bytes:
    """The trained network in ONNX, its blocks in the precisions that the parent's engine computes them in.

    Raises UsageError where one emitted block is computed in several.
    """
    batch, network = int(made.manifest["target"]["batch"]), made.trained.network
    if made.float32 or used_in(made.manifest) == ("fp32",):
        return exporting.export(network, torch.zeros(batch, *made.manifest["input"]["shape"]), ("output",))
    engine = opened(made.manifest, present=aimed_at(made.manifest).present)
    x = torch.from_numpy(first(made.data.train, CALIBRATION_IMAGES))
    models = list(_rewritten(network, precisions(made.manifest), x, batch, engine))
    return exporting.join(same_opset(models))


@torch.no_grad()
def _rewritten(
    network: nn.Module, wanted: dict[str, str], x: torch.Tensor, batch: int, engine: Engine
) -> Iterator[bytes]:
    """Each part of the network in ONNX, in the precision wanted, calibrated on what `x` becomes on the way."""
    for name, part in network.named_children():
        example = torch.zeros(batch, *x.shape[1:])
        model = exporting.export(part, example, ("out",), input_names=("in",))
        if wanted.get(name, "fp32") != "fp32":
            model = engine.rewrite(model, wanted[name], batches(x.numpy(), batch))
        yield model
        x = part(x.clone())


def precisions(manifest: dict[str, Any]) -> dict[str, str]:
    """The precision of each block of an emitted network; consecutive blocks of a donor are one there."""
    names = {one.name for one in fields(BlockRef)}
    blocks = tuple(
        BlockRef(**{key: value for key, value in block.items() if key in names})
        for block in manifest["selected"]["blocks"]
    )
    runs: list[list[BlockRef]] = [[blocks[0]]]
    for one, other in pairwise(blocks):
        if one.donor == other.donor and one.last == other.first:
            runs[-1].append(other)
        else:
            runs.append([other])
    if len(runs) != len(merged(Assembly(tuple(block.plain for block in blocks))).blocks):
        raise UsageError("this bundle's blocks are not those of its model.py: give --float32")
    for run in runs:
        if len({block.precision for block in run}) > 1:
            raise UsageError(
                f"the parent's engine computes {', '.join(map(str, run))} in several precisions, and they are one "
                "block of model.py: give --float32 for an engine that computes everything in float32"
            )
    return {f"block{place}": run[0].precision for place, run in enumerate(runs)}


def _files(made: Finetuned, model: bytes) -> dict[str, bytes]:
    weights = {name: value.clone().contiguous() for name, value in made.trained.network.state_dict().items()}
    blocks = made.record.get("blockwise")
    kept = {name: (made.parent / name).read_bytes() for name in KEPT if name in made.manifest["files"]}
    return {
        **kept,
        "model.py": (made.parent / "model.py").read_bytes(),
        "weights.safetensors": save(weights),
        "model.onnx": model,
        "reproduce.sh": reproduce("Fine-tunes", made.command),
        LOG: as_csv(made.trained.rows).encode(),
        **({BLOCKS_LOG: as_csv(blocks["log"]).encode()} if blocks else {}),
    }


def _manifest(made: Finetuned, model: bytes, images: Array) -> dict[str, Any]:
    """The manifest before the engine is built: nothing of it is measured yet."""
    body = {name: value for name, value in made.manifest.items() if name not in DROPPED}
    earlier = made.manifest.get("lineage", []) + ([made.manifest["finetune"]] if "finetune" in made.manifest else [])
    module, batch = outputs(made.trained.network, torch.from_numpy(images)), int(made.manifest["target"]["batch"])
    selected = _selected(made)
    plain = plain_run(model, batch, images)
    parity = compare(module, plain, plain, coarsest(used_in({"selected": selected})))
    check(parity)
    return {
        **body,
        "derc": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "unmeasured",
        "command": made.command,
        "classes": None if made.labels is None else list(made.labels),
        "selected": selected,
        "latency": _latency(made.manifest["latency"]),
        "accuracy": _accuracy(made),
        "parity": asdict(parity),
        "placement": {},
        "finetune": _record(made),
        "lineage": earlier,
    }


def _selected(made: Finetuned) -> dict[str, Any]:
    """What is assembled, as the parent has it; a donor that was trained is intact no more."""
    selected = dict(made.manifest["selected"])
    selected["intact"] = selected.get("intact", False) and made.trained.kept == "before"
    if made.float32:
        selected["blocks"] = [{**block, "precision": "fp32"} for block in selected["blocks"]]
    return selected


def _latency(parent: dict[str, Any]) -> dict[str, Any]:
    """What is known before it is measured: the parent's, of the same network with other weights, is recorded."""
    known = parent.get("foreseen", parent) if parent["measured_ms"] is None else parent
    measured = known["measured_ms"] is not None
    return {
        "predicted_ms": parent.get("predicted_ms"),
        "measured_ms": None,
        "recorded_ms": known["measured_ms"] if measured else known.get("recorded_ms"),
        "ci95_ms": known["ci95_ms"],
        "provenance": "recorded" if measured else known["provenance"],
        "stable": known["stable"],
        "samples": 0,
        "noise": known.get("noise"),
        "anchor_ms": known.get("anchor_ms"),
    }


def _accuracy(made: Finetuned) -> dict[str, Any]:
    """The trained network's accuracies; beside the donors' where those were found on the same held-out images."""
    parent = made.manifest.get("accuracy") or {}
    beside = ("donors", "best_intact_within_budget", "random_stitch_heldout")
    same = parent.get("heldout") is not None and abs(parent["heldout"] - made.heldout["before"]) < 1e-12
    kept = {name: parent[name] for name in beside if same and name in parent}
    return {**kept, "validation": made.trained.after.accuracy, "heldout": made.heldout["after"], "of": "module"}


def _record(made: Finetuned) -> dict[str, Any]:
    """Parent, data, hyperparameters, and what came of them."""
    trained, rows = made.trained, made.trained.rows
    facts = ("kept", "epoch", "steps", "images", "stopped", "micro", "device", "processes")
    return {
        "parent": {
            "path": str(made.parent.absolute()),
            "seal": made.manifest["seal"],
            "created": made.manifest["created"],
        },
        **made.record,
        "accuracy": {
            "validation": {"before": trained.before.accuracy, "after": trained.after.accuracy},
            "heldout": made.heldout,
        },
        "loss": {
            "validation": {"before": trained.before.loss, "after": trained.after.loss},
            "training": {"first_epoch": rows[0]["loss"], "last_epoch": rows[-1]["loss"]} if rows else None,
        },
        **{name: getattr(trained, name) for name in facts},
        "seconds": round(trained.seconds, 3),
        "log": list(rows),
    }
