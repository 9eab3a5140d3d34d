"""The final report of a compile: the bundle's files and the result that the user sees."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from derc import bundle, evaluations
from derc.artifacts import Emitted, Shipped
from derc.config import KEYS, CompileSettings
from derc.ir import Graph
from derc.manifest import manifest_of, target_of
from derc.outcome import Outcome, plan_graph
from derc.report import render
from derc.tables import sample_lines
from derc.text import print_graph
from derc.triton import kind_of, model_repository
from derc.version import VERSION

RESULT = ("status", "target", "budget", "selected", "latency", "accuracy", "solver", "parity", "timings_s", "artifacts")


def result(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that `derc compile --json` prints."""
    return {name: manifest[name] for name in RESULT}


def command_line(settings: CompileSettings, *words: str, names: Iterable[str] = KEYS) -> str:
    """The command that repeats this from any directory, the output left out: `words` (compile) and settings `names`."""
    return shlex.join(["derc", *(words or ("compile",)), *_arguments(settings, set(names) - {"output"})])


def _arguments(settings: CompileSettings, names: set[str]) -> list[str]:
    """The flags that give these settings, paths made absolute."""
    result: list[str] = []
    for name, value in settings.model_dump(include=names, exclude_none=True).items():
        if isinstance(value, bool):
            result += [f"--{name.replace('_', '-')}"] if value else []
            continue
        if name == "data" and isinstance(value, str) and ":" in value:
            kind, _, path = value.partition(":")
            value = f"{kind}:{Path(path).absolute()}"
        elif name in ("zoo", "checkpoint") and Path(str(value)).is_file():
            value = str(Path(str(value)).absolute())
        result += [f"--{name.replace('_', '-')}", str(value)]
    return result


def told(manifest: dict[str, Any]) -> list[str]:
    """What a compile or a build says of its network at the end."""
    accuracy = manifest.get("accuracy") or {}
    lines = [f"network   {manifest['selected']['assembly']}", f"latency   {_latency_text(manifest)}"]
    if accuracy.get("heldout") is not None:
        best = accuracy.get("best_intact_within_budget")
        beside = f"; best intact donor within the budget: {best['donor']} {best['heldout']:.4f}" if best else ""
        if best and best.get("recalibrated"):
            beside += f" with batch norms estimated anew ({best['heldout_as_it_came']:.4f} as it came)"
        lines.append(f"accuracy  {accuracy['heldout']:.4f} held-out, {_training_text(manifest)}{beside}")
    for other in (manifest.get("finetune") or {}).get("against", ()):
        if not other["kept"]:
            lines.append(f"against   {other['assembly']} {other['heldout']['after']:.4f} held-out, trained alike")
    head = (manifest.get("head") or {}).get("network")
    if head is not None:
        lines.append(f"head      fitted to {head['images']} images by {head['method']} regression")
    matching = manifest.get("matching")
    if matching is not None:
        lines.append(f"matching  {_matching_text(matching)}")
    folder = Path(manifest["artifacts"]["manifest.json"]).parent
    lines.append(f"bundle    {folder}")
    if manifest["status"] == "unmeasured":
        lines.append(f"not measured: on {manifest['target']['name']}, run derc build {folder}")
    return lines


def _matching_text(matching: dict[str, Any]) -> str:
    agreement = matching["agreement"]
    shown = f"{matching['images']} images without labels in {matching['seconds']:.0f} s"
    if not matching["kept"]:
        return f"{shown} made it no better, so it is as it was"
    return f"{shown}: agreement with {matching['teacher']} {agreement['before']:.4f} to {agreement['after']:.4f}"


def _training_text(manifest: dict[str, Any]) -> str:
    """What training the network has seen."""
    tuned = manifest.get("finetune")
    if not tuned:
        return "no training"
    before = f"before {tuned['accuracy']['heldout']['before']:.4f}"
    if tuned["kept"] == "before":
        return f"{before}: training made it no better on the validation images, so its weights are the parent's"
    blocks = tuned.get("blockwise") or {"kept": False}
    shown = f"{tuned['images']} images in {tuned['seconds']:.0f} s"
    unlabelled = f"blocks taught on {blocks['images']} without labels" if blocks["kept"] else ""
    return ", ".join(filter(None, (before, unlabelled, shown if tuned["images"] else "")))


def _latency_text(manifest: dict[str, Any]) -> str:
    latency, budget = manifest["latency"], manifest["budget"]["latency_ms"]
    limit = f" (budget {budget:g} ms)" if budget is not None else ""
    low, high = latency["ci95_ms"] or (None, None)
    if latency["measured_ms"] is not None:
        return f"{latency['measured_ms']:.3f} ms measured, 95% interval {low:.3f} to {high:.3f}{limit}"
    ms = latency["recorded_ms"] or latency["predicted_ms"]
    return f"{ms:.3f} ms {latency['provenance']}, {low:.3f} to {high:.3f}{limit}" if ms is not None else "not known"


def summarise(outcome: Outcome, started: float) -> dict[str, Any]:
    """Write the bundle; returns its manifest with `artifacts`, the paths of its files."""
    start = time.perf_counter()
    manifest = manifest_of(outcome)
    seconds = {**outcome.timings.seconds, "report": time.perf_counter() - start, "total": time.perf_counter() - started}
    manifest["timings_s"] = {name: round(value, 3) for name, value in seconds.items()}
    manifest["reused"] = sorted(name for name, reused in outcome.timings.reused.items() if reused)
    return write_network(Path(outcome.settings.output), _files(outcome), manifest)


def write_network(
    output: Path, files: dict[str, bytes], manifest: dict[str, Any], *, over: bool = False
) -> dict[str, Any]:
    """Write a bundle of these files and its report; returns its manifest with `artifacts`, the paths of its files.

    With `over` it takes the place of the bundle at `output`.
    """
    listed = {**manifest, "files": {name: bundle.sha256(data) for name, data in sorted(files.items())}}
    files = {**files, "report.html": render(listed).encode()}
    sealed = bundle.write(output, files, manifest, over=over)
    return {**sealed, "artifacts": {name: str(output / name) for name in (*sorted(files), bundle.MANIFEST)}}


def _files(outcome: Outcome) -> dict[str, bytes]:
    plan = plan_graph(outcome.chosen.assembly, outcome.search.cuts.donors)
    script = reproduce("Compiles", outcome.command)
    shipped = outcome.shipped
    files = network_files(outcome.emitted, shipped, outcome.context.engine.suffix, plan)
    samples = sample_lines(outcome.search.table.samples | shipped.samples).encode()
    if outcome.settings.emit == "triton":
        files |= served(files, target_of(outcome.context)["engine"])
    log = evaluations.lines(outcome.search.log).encode()
    return {**files, "samples.jsonl": samples, evaluations.FILE: log, "reproduce.sh": script}


def served(files: Mapping[str, bytes], described: Mapping[str, str]) -> dict[str, bytes]:
    """The Triton model repository of a network's `files`, under triton/, for the engine that is `described`.

    Empty where Triton serves the engine's own file and that is not built yet: `derc build` adds it.
    """
    engine = next((data for name, data in files.items() if Path(name).stem == "engine"), None)
    if engine is None and not kind_of(described).portable:
        return {}
    repository = model_repository(files["model.onnx"], engine, described)
    return {f"triton/{name}": data for name, data in repository.items()}


def network_files(emitted: Emitted, shipped: Shipped, suffix: str, plan: Graph) -> dict[str, bytes]:
    """The network in all its forms: source, weights, ONNX, plan, and, where it was built, `engine` + `suffix`, lock."""
    plan.verify()
    weights = {name: torch.from_numpy(value.copy()) for name, value in emitted.weights.items()}
    lock = {"engine.lock.json": shipped.lock.encode()} if shipped.lock else {}
    return {
        "model.py": emitted.source.encode(),
        "weights.safetensors": save(weights),
        "model.onnx": emitted.onnx.tobytes(),
        **({f"engine{suffix}": shipped.engine.tobytes()} if len(shipped.engine) else {}),
        **lock,
        "plan.txt": print_graph(plan).encode(),
    }


def reproduce(what: str, command: str) -> bytes:
    """The script that repeats `command`; `what` it does is a verb, such as Compiles."""
    lines = [
        "#!/bin/sh",
        f"# {what} this bundle again with derc {VERSION}, into the directory given (default: reproduced).",
        f'{command} -o "${{1:-reproduced}}"',
    ]
    return ("\n".join(lines) + "\n").encode()
