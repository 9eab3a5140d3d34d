"""Five latency budgets between the fastest and the slowest donor: what is promised, measured and reached.

    python benchmarks/compile.py [--zoo digits --data digits] [--budgets 5] [-o result.json]

Prints one JSON object; `python benchmarks/compare.py result.json` makes a table of it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click


def run(words: list[str], store: Path) -> tuple[dict[str, Any], float]:
    """One derc command with --json in a process of its own: its object and the seconds it took."""
    start = time.perf_counter()
    environ = {**os.environ, "DERC_CACHE": str(store)}
    command = [sys.executable, "-m", "derc", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout), seconds


def spread(table: dict[str, Any], count: int) -> list[float]:
    """`count` budgets in equal ratios, from just above the fastest donor to just above the slowest."""
    times = sorted(row["ms"] for row in table["donors"].values())
    low, high = 1.1 * times[0], 1.05 * times[-1]
    return [round(low * (high / low) ** (i / (count - 1)), 4) for i in range(count)]


def row(budget: float, found: dict[str, Any], seconds: float, manifest: dict[str, Any]) -> dict[str, Any]:
    """What one compile promised and kept."""
    latency, accuracy, parity = found["latency"], found["accuracy"], found["parity"]
    return {
        "budget_ms": budget,
        "measured_ms": latency["measured_ms"],
        "ci95_ms": latency["ci95_ms"],
        "within": latency["ci95_ms"][1] <= budget,
        "predicted_over_measured": latency["predicted_ms"] / latency["measured_ms"],
        "assembly": found["selected"]["assembly"],
        "intact": found["selected"]["intact"],
        "heldout": accuracy["heldout"],
        "best_intact": accuracy["best_intact_within_budget"],
        "random_stitch_heldout": accuracy["random_stitch_heldout"],
        "largest_difference": max(parity[name] for name in ("module_onnx", "onnx_engine", "module_engine")),
        "seconds": seconds,
        "reused": manifest["reused"],
        "timings_s": found["timings_s"],
    }


def help_seconds(runs: int = 7) -> float:
    """Median seconds of derc --help."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "derc", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


@click.command()
@click.option("--zoo", default="digits")
@click.option("--data", default="digits")
@click.option("--budgets", default=5)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(zoo: str, data: str, budgets: int, output: Path | None) -> None:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        source = ["--zoo", zoo, "--data", data]
        probe, first = run(["compile", *source, "--macs-g", "1e6", "-o", f"{folder}/first"], store)
        table, _ = run(["profile", *source], store)
        rows = []
        for budget in spread(table, budgets):
            out = Path(folder, f"b{budget}")
            found, seconds = run(["compile", *source, "--latency-ms", str(budget), "-o", str(out)], store)
            if found["status"] == "error":
                rows.append({"budget_ms": budget, **found})
                continue
            rows.append(row(budget, found, seconds, json.loads((out / "manifest.json").read_text())))
            print(f"budget {budget} ms done in {seconds:.1f} s", file=sys.stderr)
    result = {
        "benchmark": "compile",
        "machine": {**table["engine"], "python": platform.python_version()},
        "noise": table["noise"],
        "first_seconds": first,
        "first_timings_s": probe["timings_s"],
        "help_seconds": help_seconds(),
        "donors": {name: row["ms"] for name, row in table["donors"].items()},
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if output:
        output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
