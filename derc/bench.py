"""derc bench: a bundle's engine against eager PyTorch and the donors, all in the same interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from derc import bundle, enginelock, exporting, registry
from derc.console import Console
from derc.donor import left_out
from derc.engine import Engine, Session
from derc.errors import DercError, UsageError
from derc.lowered import Lowered
from derc.measure import Measurement, MeasureOptions, measure
from derc.workspace import LiveDonors
from derc.zoo import Zoo


def bench_bundle(folder: Path, limit_s: float, console: Console) -> dict[str, Any]:
    """Latencies of the engine, of the module in eager PyTorch, and of every donor's engine.

    Raises IntegrityError for what is no bundle, MissingDependencyError where its engine's runtime is absent.
    """
    manifest = bundle.verify(folder)
    described = manifest["target"]["engine"]
    spec = ":".join(part for part in (described["engine"], described.get("variant")) if part)
    engine: Engine = registry.open_engine(spec, int(described.get("threads", 0)))
    batch = int(manifest["target"]["batch"])
    with ExitStack() as stack:
        calls: dict[str, Callable[[], float]] = {}
        session = load_engine(folder, engine)
        stack.callback(session.close)
        calls["engine"] = session.time
        calls["eager PyTorch"] = stack.enter_context(
            _Eager(bundle.load(folder), manifest, int(described.get("threads", 0)))
        )
        missing = _add_donors(calls, stack, engine, manifest, batch, console)
        measured = measure(calls, MeasureOptions(limit_s=limit_s), anchor="engine", track=console.track)
    return _result(manifest, measured, engine.describe(), missing)


def load_engine(folder: Path, engine: Engine) -> Session:
    """The session of a verified bundle's engine.

    Raises UsageError where it is not built yet, MissingDependencyError where it was built for another device or by
    other versions.
    """
    path = folder / f"engine{engine.suffix}"
    if not path.exists():
        raise UsageError(f"{folder} has no engine yet: run derc build {folder} on its target")
    if enginelock.place(path).exists():
        enginelock.read(path, engine.describe())
    return engine.load(path)


class _Eager:
    """Times the module in eager PyTorch with the engine's number of threads."""

    def __init__(self, network: torch.nn.Module, manifest: dict[str, Any], threads: int) -> None:
        self.network, self.threads, self.before = network, threads, torch.get_num_threads()
        self.x = torch.rand(int(manifest["target"]["batch"]), *manifest["input"]["shape"])

    def __enter__(self) -> Callable[[], float]:
        torch.set_num_threads(self.threads)
        return self.time

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)

    @torch.inference_mode()
    def time(self) -> float:
        start = time.perf_counter()
        self.network(self.x)
        return time.perf_counter() - start


def _add_donors(
    calls: dict[str, Callable[[], float]],
    stack: ExitStack,
    engine: Engine,
    manifest: dict[str, Any],
    batch: int,
    console: Console,
) -> str | None:
    """Add a call for each donor; returns why there are none where the zoo cannot be read any more."""
    try:
        size = manifest["zoo"].get("input_size")
        zoo = Zoo.load(manifest["zoo"]["spec"], checkpoint=None, input_size=tuple(size) if size else None)
    except DercError as error:
        return str(error)
    live = LiveDonors(zoo, manifest["zoo"]["negligible"])
    for name in console.track(zoo.names, "export", len(zoo.names)):
        try:
            session = engine.open(_export(live[name], batch, name))
        except UsageError as error:
            console.say(left_out(name, error))
            continue
        stack.callback(session.close)
        calls[name] = session.time
    return None


def _export(lowered: Lowered, batch: int, name: str) -> bytes:
    example = torch.zeros(batch, *lowered.cuts[0].type.shape)
    return exporting.export(lowered.block(0, len(lowered.units)), example, ("output",), name=f"donor {name}")


def _result(
    manifest: dict[str, Any], measured: Measurement, engine: dict[str, str], missing: str | None
) -> dict[str, Any]:
    reference = measured.timings["engine"].median
    rows: dict[str, dict[str, Any]] = {
        name: {
            "ms": timing.median * 1e3,
            "ci95_ms": [timing.low * 1e3, timing.high * 1e3],
            "stable": timing.stable,
            "samples": len(timing.samples),
            "percentiles_ms": {f"p{p}": value * 1e3 for p, value in timing.percentiles.items()},
            "ratio_to_engine": timing.median / reference,
        }
        for name, timing in measured.timings.items()
    }
    budget = manifest["budget"]["latency_ms"]
    return {
        "status": "ok",
        "engine": engine,
        "noise": measured.noise,
        "budget_ms": budget,
        "within_budget": None if budget is None else rows["engine"]["ci95_ms"][1] <= budget,
        "latency": rows,
        "donors_left_out": missing,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'':<28}{'median ms':>10}  {'95% interval':>20}  {'× engine':>8}"]
    for name, row in result["latency"].items():
        low, high = row["ci95_ms"]
        mark = "" if row["stable"] else "  unstable"
        interval = f"{low:.4f} to {high:.4f}"
        lines.append(f"{name:<28}{row['ms']:>10.4f}  {interval:>20}  {row['ratio_to_engine']:>8.2f}{mark}")
    lines.append(f"A/A noise {result['noise']:.2%}; all measured, interleaved")
    if result["budget_ms"] is not None:
        verdict = "within" if result["within_budget"] else "over"
        lines.append(f"the engine is {verdict} its budget of {result['budget_ms']:g} ms")
    if result["donors_left_out"]:
        lines.append(f"donors left out: {result['donors_left_out']}")
    return "\n".join(lines)
