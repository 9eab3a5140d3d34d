"""A benchmark's JSON as a Markdown table: python benchmarks/compare.py result.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

COLUMNS = {
    "budget_ms": "budget ms",
    "measured_ms": "measured ms",
    "within": "within",
    "predicted_over_measured": "predicted / measured",
    "heldout": "held-out",
    "best": "best intact",
    "random_stitch_heldout": "random stitches",
    "largest_difference": "largest difference",
    "seconds": "seconds",
    "assembly": "network",
}


def cell(value: Any) -> str:
    """One value as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command()
@click.argument("result", type=click.Path(exists=True, path_type=Path))
def main(result: Path) -> None:
    """Print the table."""
    found = json.loads(result.read_text())
    machine = found["machine"]
    print(f"{machine['device']}, {machine['threads']} threads, onnxruntime {machine['onnxruntime']}; ", end="")
    print(f"first compile {found['first_seconds']:.1f} s, derc --help {found['help_seconds']:.2f} s\n")
    print("| " + " | ".join(COLUMNS.values()) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for row in found["rows"]:
        best = row.get("best_intact")
        row["best"] = f"{best['heldout']:.4g} ({best['donor']})" if best else None
        print("| " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |")
    sys.exit(0 if all(row.get("within") for row in found["rows"]) else 1)


if __name__ == "__main__":
    main()
