"""Every architecture: which networks derc lowers, how finely it cuts them, and whether the blocks are exactly the donor.

    python benchmarks/coverage.py [--quick | --all] [--jobs 2] [--json result.json] [--state out/coverage.jsonl]

The smallest network of every model module of timm (`--all`: every architecture up to 100 M parameters), random weights,
at its native input size. Each runs in a child process under a time and a memory limit; what is done is kept in the state
file, and the same command goes on from there. Prints a table; `--json` gets machine, protocol, rows and figures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click
import psutil

LARGEST = 100_000_000
QUICK = (
    "resnet10t",
    "mobilenetv3_small_050",
    "regnetx_002",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "densenet121",
    "levit_128s",
    "test_beit",
)
LEAST_CUTS = 3
POLL_S = 0.1


def registered() -> dict[str, str]:
    """Every architecture of timm and the model module that it is defined in."""
    import timm
    from timm.models._registry import _model_to_module

    return {name: _model_to_module[name] for name in timm.list_models()}


def count_params(names: Iterable[str]) -> dict[str, int]:
    """Parameters by architecture, counted on networks without storage where that works."""
    import timm
    import torch

    found = {}
    for name in names:
        try:
            with torch.device("meta"):
                network = timm.create_model(name)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            network = timm.create_model(name)
        found[name] = sum(p.numel() for p in network.parameters())
    return found


def choose(families: dict[str, str], params: dict[str, int], *, everything: bool) -> list[str]:
    """Networks to examine: all up to LARGEST parameters, or the smallest of each family; small ones first."""
    names = sorted(families, key=lambda name: (params[name], name))
    if everything:
        return [name for name in names if params[name] <= LARGEST]
    smallest = {families[name]: name for name in reversed(names)}
    return sorted(smallest.values(), key=lambda name: params[name])


def child(name: str, path: str, onnx: bool) -> None:
    """Examine one network and keep the row in the file at `path`, also where it fails."""
    import torch

    from benchmarks.exactness import examine, make, source_line
    from derc.errors import DercError

    torch.set_num_threads(1)
    known: dict[str, Any] = {}

    def tell(row: dict[str, Any]) -> None:
        known.update(row, peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        temporary = Path(f"{path}.new")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(path)

    try:
        tell(examine(lambda: make(name), onnx=onnx, tell=tell))
    except Exception as error:  # any library may raise anything, and the reason is the result
        step = "onnx_reason" if "train_exact" in known else "reason"
        known.setdefault(step, str(error) if isinstance(error, DercError) else source_line(error))
        tell({"onnx_parity": False} if step == "onnx_reason" else {})


class Job:
    """One child process, watched."""

    def __init__(self, name: str, folder: Path, onnx: bool) -> None:
        self.name, self.path, self.start = name, folder / f"{name.replace('/', '_')}.json", time.monotonic()
        context = multiprocessing.get_context("forkserver")
        self.process: BaseProcess = context.Process(target=child, args=(name, str(self.path), onnx))
        self.process.start()
        self.killed = ""

    def done(self, limit_s: float, limit_mb: float) -> bool:
        """Whether it has ended; it is killed where it is over a limit."""
        if not self.process.is_alive():
            return True
        seconds = time.monotonic() - self.start
        try:
            memory = psutil.Process(self.process.pid).memory_info().rss / 1e6
        except psutil.Error:
            return False
        if seconds > limit_s:
            self.killed = f"over the time limit of {limit_s:.0f} s"
        elif memory > limit_mb:
            self.killed = f"over the memory limit of {limit_mb:.0f} MB"
        if self.killed:
            self.process.kill()
            self.process.join()
        return bool(self.killed)

    def row(self) -> dict[str, Any]:
        """What is known of the network, with a reason where it did not come to its end."""
        row = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.process.join()
        problem = self.killed or (f"ended with signal or code {self.process.exitcode}" if self.process.exitcode else "")
        if problem:
            row.setdefault("onnx_reason" if "train_exact" in row else "reason", problem)
            if "train_exact" in row:
                row["onnx_parity"] = False
        return {"name": self.name, **row, "seconds": round(time.monotonic() - self.start, 1)}


def run(names: list[str], state: Path, *, jobs: int, onnx: bool, limit_s: float, limit_mb: float) -> None:
    """Examine `names`, `jobs` at a time, and append their rows to `state`."""
    waiting, running = list(names), list[Job]()
    with tempfile.TemporaryDirectory() as folder, state.open("a", encoding="utf-8") as file:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Job(waiting.pop(0), Path(folder), onnx))
            time.sleep(POLL_S)
            for job in [job for job in running if job.done(limit_s, limit_mb)]:
                running.remove(job)
                row = job.row()
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{len(waiting) + len(running):>5} left  {brief(row)}", file=sys.stderr)


def brief(row: dict[str, Any]) -> str:
    reason = row.get("reason") or row.get("onnx_reason") or "ok"
    return f"{row['name']:<44} {row['seconds']:>7.1f} s  {reason}"


def exact(row: dict[str, Any]) -> bool:
    """Exact in eval and train mode with enough cuts."""
    return bool(row.get("eval_exact") and row.get("train_exact") and row.get("interior_cuts", 0) >= LEAST_CUTS)


def share(rows: list[dict[str, Any]], key: str) -> float:
    return round(sum(bool(row.get(key)) for row in rows) / max(len(rows), 1), 4)


def figures(rows: list[dict[str, Any]], heads: set[str]) -> dict[str, float]:
    """Shares of what was tried, and the fewest interior cuts among the networks that are lowered."""
    tried = [row for row in rows if "onnx_parity" in row]
    good = [{**row, "exact": exact(row)} for row in rows]
    return {
        "networks": len(rows),
        "families": len(heads),
        "families_exact": share([row for row in good if row["name"] in heads], "exact"),
        "all_exact": share(good, "exact"),
        "lowered": share(rows, "lowered"),
        "eval_exact": share(rows, "eval_exact"),
        "train_exact": share(rows, "train_exact"),
        "onnx_parity": share(tried, "onnx_parity"),
        "onnx_tried": len(tried),
        "min_interior_cuts": min((row["interior_cuts"] for row in rows if "interior_cuts" in row), default=0),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "peak_mb": max((row.get("peak_mb", 0) for row in rows), default=0),
    }


COLUMNS = ("family", "name", "params_m", "residuals", "all_cuts", "interior_cuts", "units", "eval", "train", "onnx")
COLUMNS += ("seconds", "peak_mb", "why")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        shown = {
            **row,
            "params_m": round(row.get("params", 0) / 1e6, 2),
            "eval": mark(row.get("eval_exact")),
            "train": mark(row.get("train_exact")),
            "onnx": mark(row.get("onnx_parity")),
            "why": row.get("reason") or row.get("onnx_reason") or "",
        }
        lines.append("| " + " | ".join(str(shown.get(name, "–")) for name in COLUMNS) + " |")
    return "\n".join(lines)


def mark(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def machine() -> dict[str, Any]:
    names = ("torch", "timm", "onnx", "onnxruntime", "derc")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def read_state(state: Path) -> dict[str, dict[str, Any]]:
    """Rows by network, the last one of each."""
    lines = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def known_params(families: dict[str, str], state: Path) -> dict[str, int]:
    """Parameter counts of all architectures, kept beside the state file."""
    path = state.with_suffix(".params.json")
    found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in families if name not in found]
    if missing:
        print(f"counting the parameters of {len(missing)} architectures", file=sys.stderr)
        found |= count_params(missing)
        path.write_text(json.dumps(found))
    return found


@click.command()
@click.option("--quick", is_flag=True, help="Ten small networks of ten families: at most 5 minutes on 2 cores.")
@click.option("--all", "everything", is_flag=True, help="Every architecture up to 100 M parameters.")
@click.option("--only", help="These networks, by comma: timm names, torchvision:NAME or transformers:NAME.")
@click.option("--retry", is_flag=True, help="Examine again what failed before.")
@click.option("--onnx/--no-onnx", default=True, help="Export blocks and hold them against ONNX Runtime.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--limit-s", default=600.0, show_default=True)
@click.option("--limit-mb", default=10000.0, show_default=True)
@click.option("--state", type=click.Path(path_type=Path), help="Where rows are kept, so that a run can be resumed.")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    quick: bool,
    everything: bool,
    only: str | None,
    retry: bool,
    onnx: bool,
    jobs: int,
    limit_s: float,
    limit_mb: float,
    state: Path | None,
    output: Path | None,
) -> None:
    """Run the benchmark."""
    state = state or Path("out", "coverage-quick.jsonl" if quick else "coverage.jsonl")
    state.parent.mkdir(parents=True, exist_ok=True)
    if quick and not only:
        state.unlink(missing_ok=True)
    families = registered()
    if only or quick:
        names = only.split(",") if only else list(QUICK)
    else:
        names = choose(families, known_params(families, state), everything=everything)
    done = read_state(state)
    fresh = [n for n in names if n not in done or (retry and (done[n].get("reason") or done[n].get("onnx_reason")))]
    multiprocessing.set_forkserver_preload(["timm", "benchmarks.exactness"])
    run(fresh, state, jobs=jobs, onnx=onnx, limit_s=limit_s, limit_mb=limit_mb)
    done = read_state(state)
    rows = [{"family": families.get(name, name.partition(":")[0]), **done[name]} for name in names]
    heads = {row["family"]: row["name"] for row in reversed(rows)}
    found = figures(rows, set(heads.values()))
    print(table(sorted(rows, key=lambda row: (row["family"], row.get("params", 0)))))
    print("\n" + "  ".join(f"{name} {value}" for name, value in found.items()))
    if output:
        protocol = {"quick": quick, "all": everything, "largest_params": LARGEST, "least_cuts": LEAST_CUTS, "onnx": onnx}
        protocol |= {"limit_s": limit_s, "limit_mb": limit_mb, "threads": 1, "jobs": jobs}
        result = {"benchmark": "coverage", "machine": machine(), "protocol": protocol, "rows": rows, "figures": found}
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    main()
