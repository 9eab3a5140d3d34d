"""Every architecture: which networks are lowered, how finely cut, and whether the blocks are exactly the donor.

    python benchmarks/coverage.py [--quick | --all] [--sources] [--json result.json] [--state out/coverage.jsonl]

The smallest network of every model module of timm (`--all`: every architecture up to 100 M parameters; `--sources`:
torchvision's classifiers and transformers' image networks too), random weights, at its native input size. Each runs in
a child process under a time and a memory limit; what is done is kept in the state file, and the same command goes on
from there. Prints a table; `--json` gets machine, protocol, rows and figures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.children import run
from benchmarks.results import machine

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
    "pvt_v2_b0",
)
LEAST_CUTS = 3


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
@click.option("--sources", is_flag=True, help="Also torchvision's classifiers and transformers' image networks.")
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
    sources: bool,
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
    if sources:
        from benchmarks.sources import listed

        names += [name for name, *_ in listed()]
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
        protocol = {"quick": quick, "all": everything, "sources": sources, "largest_params": LARGEST, "onnx": onnx}
        protocol |= {"least_cuts": LEAST_CUTS, "limit_s": limit_s, "limit_mb": limit_mb, "threads": 1, "jobs": jobs}
        result = {"benchmark": "coverage", "machine": machine(), "protocol": protocol, "rows": rows, "figures": found}
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    main()
