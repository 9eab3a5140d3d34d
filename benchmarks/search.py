"""Similarity, partition, selection and the proxy in the loop, each beside what it replaces, in one run.

    python benchmarks/search.py [--quick] [--parts similarity,partition,selection,loop] [--zoo-dir DIR] [--json FILE]

Baselines are derc's own implementations of the published algorithms from the paper's text (benchmarks/published.py,
benchmarks/published_search.py), and random and evolutionary search. A time that was extrapolated says from how much.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import search_loop
from benchmarks.results import give, machine
from benchmarks.search_partition import partition_rows, similarity_rows
from benchmarks.search_selection import selection_rows

Row = dict[str, Any]
PARTS = ("similarity", "partition", "selection", "loop")
HIDDEN = ("curves", "part")


def figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """What is quoted: the worst over zoos and seeds, but for the loop's ratio, which is a median (and its worst)."""
    found: dict[str, float | None] = {}

    def take(name: str, part: str, key: str, best: Callable[[Any], float], **where: Any) -> None:
        chosen = [row for row in rows if row["part"] == part and key in row and row[key] is not None]
        values = [row[key] for row in chosen if all(row.get(k) == v for k, v in where.items())]
        if values:
            found[name] = float(best(values))

    take("similarity_speedup", "similarity", "speedup", min)
    take("similarity_max_error", "similarity", "max_error", max)
    take("partition_speedup_24", "partition", "speedup", min, donors=24)
    take("partition_objective_ratio", "partition", "ratio", min)
    take("partition_gap_8", "partition", "gap", max, donors=8)
    take("partition_seconds_24", "partition", "seconds", max, donors=24)
    take("partition_seconds_1000", "partition", "seconds", max, donors=1000)
    take("partition_seconds_10000", "partition", "seconds", max, donors=10_000)
    take("select_seconds_1000", "selection", "seconds", max, blocks=1000)
    take("select_seconds_10000", "selection", "seconds", max, blocks=10_000)
    loop = [row for row in rows if row["part"] == "loop"]
    return found | (search_loop.figures(loop) if loop else {})


def table(rows: Sequence[Row]) -> str:
    """The rows of each part, one a line, as `name value` pairs."""
    lines = []
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        lines += [f"\n{part}"] * bool(mine)
        for row in mine:
            if part == "loop":
                lines.append("  " + search_loop.line(row))
                continue
            shown = {k: v for k, v in row.items() if k not in (*HIDDEN, "what") and v is not None}
            lines.append(f"  {row['what']}: " + ", ".join(f"{k} {_short(v)}" for k, v in shown.items()))
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command()
@click.option("--quick", is_flag=True, help="Fewer donors, seeds and restarts; at most five minutes on two cores.")
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Shared CIFAR-10 networks (or DERC_SHARED).")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(quick: bool, parts: str, zoo_dir: Path | None, output: Path | None) -> None:
    """Run the parts, print a table, and write everything as JSON."""
    chosen = parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(PARTS)}", param_hint="--parts")
    run: dict[str, Callable[[], list[Row]]] = {
        "similarity": lambda: similarity_rows(quick),
        "partition": lambda: partition_rows(quick),
        "selection": lambda: selection_rows(quick),
        "loop": lambda: search_loop.loop_rows(quick, zoo_dir),
    }
    rows: list[Row] = []
    for part in chosen:
        rows += [{"part": part} | row for row in run[part]()]
        click.echo(table([row for row in rows if row["part"] == part]))
    found = {name: value for name, value in figures(rows).items() if value is not None and math.isfinite(value)}
    result = {
        "machine": machine(),
        "protocol": {"quick": quick, "parts": chosen, "threads": os.environ.get("OMP_NUM_THREADS", "default")},
        "rows": rows,
        "figures": {name: float(f"{value:.6g}") for name, value in found.items()},
    }
    give(result, output)


if __name__ == "__main__":
    main()
