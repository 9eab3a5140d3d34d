"""derc build: a bundle's engine is built, verified and measured on the device that it was compiled for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from derc import bundle, enginelock, registry
from derc.artifacts import Array, Shipped
from derc.building import Builder
from derc.console import Console
from derc.disturbances import check_quiet
from derc.engine import Engine, Session
from derc.errors import OverBudgetError, UnstableError
from derc.judge import run_all
from derc.manifest import latency_of
from derc.measure import MeasureOptions, measure
from derc.passes.package import UNREFERENCED, Package, check, coarsest, compare, outputs, plain_run
from derc.summary import served, write_network
from derc.tables import sample_lines
from derc.target import Target
from derc.workspace import STAND_IN

OURS = ("engine", "engine.lock", "report")
"""Stems of the files that a build writes anew."""


def aimed_at(manifest: dict[str, Any]) -> Target:
    """The target that a bundle was compiled for, with its threads and batch size."""
    described, batch = manifest["target"]["engine"], int(manifest["target"]["batch"])
    named = manifest["target"].get("file") or manifest["target"]["name"]
    return Target.load(named, threads=int(described.get("threads", 0)), batch=batch)


def opened(manifest: dict[str, Any], *, present: bool = True) -> Engine:
    """A bundle's engine, or, where its device is not `present`, the one that stands in for it."""
    described = manifest["target"]["engine"]
    if not present:
        return registry.open_engine(STAND_IN)
    spec = ":".join(filter(None, (described["engine"], described.get("variant"))))
    return registry.open_engine(spec, int(described.get("threads", 0)))


def build_bundle(folder: Path, limit_s: float, console: Console, images: Array | None = None) -> dict[str, Any]:
    """Build the engine of the bundle at `folder` on this machine, and put the completed bundle in its place.

    It is verified on `images` (n, C, H, W) in [0, 1], or on random ones.
    Raises IntegrityError for what is no bundle, MissingDependencyError where this machine is not its target or lacks
    the engine, ParityError where the engine computes something else, UnstableError with the interval where its latency
    does not settle beside the budget; OverBudgetError after the bundle was completed, where it is too slow here.
    """
    manifest = bundle.verify(folder)
    target = aimed_at(manifest)
    target.require()
    engine = opened(manifest)
    check_quiet(target, console.say)
    shipped = _built(folder, manifest, engine, limit_s, console, images)
    budget, latency = (manifest.get("budget") or {}).get("latency_ms"), shipped.latency
    if budget is not None and not latency.stable and latency.low_ms <= budget < latency.high_ms:
        raise UnstableError(
            f"the latency did not settle: {latency.low_ms:.3f} to {latency.high_ms:.3f} ms for a budget of {budget} "
            "ms; stop other work on this machine, or give more time with --limit-s"
        )
    met = budget is None or latency.high_ms <= budget
    completed = _completed(manifest, shipped, engine, "ok" if met else "over_budget")
    result = write_network(folder, _files(folder, manifest, shipped, engine), completed, over=True)
    if not met:
        raise OverBudgetError(
            f"the engine was built and measured at {latency.ms:.3f} ms here, over the budget of {budget} ms; the "
            f"bundle {folder} holds it: compile again on this machine, or ask for a larger budget"
        )
    return result


def _built(
    folder: Path, manifest: dict[str, Any], engine: Engine, limit_s: float, console: Console, images: Array | None
) -> Shipped:
    """The engine, what was verified of it, and its latency."""
    model = (folder / "model.onnx").read_bytes()
    with tempfile.TemporaryDirectory() as scratch, Builder(engine) as builder:
        path = Path(scratch, f"engine{engine.suffix}")
        with console.status("build"):
            builder.build(model, path, "the network")
        session = engine.load(path)
        try:
            parity = _parity(folder, manifest, engine, session, model, images)
            options = MeasureOptions(limit_s=limit_s)
            measured = measure({"network": session.time}, options, track=console.track)
            placement = session.placement()
        finally:
            session.close()
        timing = measured.timings["network"]
        return Shipped(
            np.frombuffer(path.read_bytes(), dtype=np.uint8),
            parity,
            timing.latency(),
            measured.control.latency(),
            measured.noise,
            placement,
            enginelock.beside(path, engine.describe(), "+".join(used_in(manifest))),
            {"built network": np.array(timing.samples)},
        )


def _parity(
    folder: Path, manifest: dict[str, Any], engine: Engine, session: Session, model: bytes, images: Array | None
) -> Any:
    """Module, ONNX and engine held against each other; raises ParityError."""
    used = used_in(manifest)
    precision, batch = coarsest((engine.precisions[0], *used)), int(manifest["target"]["batch"])
    if images is None:
        count = Package().images if precision == "fp32" else Package().more_images
        images = np.random.default_rng(0).random((count, *manifest["input"]["shape"]), dtype=np.float32)
    plain = None if set(used) & set(UNREFERENCED) else plain_run(model, batch, images)
    module = outputs(bundle.load(folder), torch.from_numpy(images))
    parity = compare(module, plain, run_all(session, images, batch), precision)
    check(parity)
    return parity


def used_in(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The precisions of the network's blocks, each once."""
    return tuple(dict.fromkeys(block.get("precision", "fp32") for block in manifest["selected"]["blocks"]))


def _completed(manifest: dict[str, Any], shipped: Shipped, engine: Engine, status: str) -> dict[str, Any]:
    body = {name: value for name, value in manifest.items() if name not in ("files", "seal", "artifacts")}
    before = manifest["latency"]
    foreseen = {"foreseen": before.get("foreseen", before)}
    return {
        **body,
        "status": status,
        "built": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {**manifest["target"], "engine": engine.describe(), "present": True},
        "latency": latency_of(shipped, before.get("predicted_ms")) | foreseen,
        "parity": asdict(shipped.parity),
        "placement": shipped.placement,
    }


def _files(folder: Path, manifest: Mapping[str, Any], shipped: Shipped, engine: Engine) -> dict[str, bytes]:
    """The bundle's files with the engine's in place of earlier ones."""
    kept = [name for name in manifest["files"] if Path(name).stem not in OURS and not name.startswith("triton/")]
    files = {name: (folder / name).read_bytes() for name in kept}
    files[f"engine{engine.suffix}"] = shipped.engine.tobytes()
    if shipped.lock:
        files["engine.lock.json"] = shipped.lock.encode()
    earlier = files.get("samples.jsonl", b"").splitlines(keepends=True)
    others = [line for line in earlier if json.loads(line)["name"] not in shipped.samples]
    files["samples.jsonl"] = b"".join(others) + sample_lines(shipped.samples).encode()
    if manifest.get("emit") == "triton":
        files |= served(files, engine.describe())
    return files
