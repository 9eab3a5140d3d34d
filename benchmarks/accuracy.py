"""Accuracy of what derc assembles, without training and with little, against donors, the paper's protocol and others.

    python benchmarks/accuracy.py [--quick] [--zoo-dir DIR] [--seeds 3] [--budgets 10] [--work DIR] [--json FILE]

Ten latency budgets in even ratios between the fastest and the slowest donor on this processor (derc's own profile),
three seeds (images, training and search). At each, derc's search gives its best assembly that is no intact donor (the
best by validation accuracy among those that were matched), at four stages: as compiled; matched without labels; an
epoch with frozen blocks; a short training of everything. Held-out images choose nothing. Everything that was computed
stays in --work, so that a run that was cut off goes on, and `--seed-only 1` lets processes share the work.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.accuracy_figures import Row, figures
from benchmarks.accuracy_networks import BATCH, RATES
from benchmarks.accuracy_plots import plots
from benchmarks.accuracy_rounds import Round
from benchmarks.accuracy_tables import costs, networks, table
from benchmarks.accuracy_world import NotComputedError, World, open_world
from benchmarks.accuracy_zoo import FAMILIES, FULL, QUICK, Size
from benchmarks.results import give, machine
from derc.errors import DercError

QUICK_BUDGETS = 2


def protocol(world: World, seeds: int) -> dict[str, Any]:
    """What was compared, on which images and within which budgets."""
    donors = {name: {"ms": latency.ms, "family": FAMILIES[name]} for name, latency in world.table.donors.items()}
    return {
        "size": asdict(world.size),
        "donors": donors,
        "families": len({one["family"] for one in donors.values()}),
        "budgets_ms": world.budgets,
        "seeds": seeds,
        "rates": RATES,
        "batch": BATCH,
        "noise": world.table.noise,
        "text": __doc__,
    }


def tuned(world: World, seeds: list[int]) -> list[Row]:
    """The donors' own front of each seed."""
    rows = []
    for seed in seeds:
        with suppress(NotComputedError):
            rows += Round(world, seed).donors()
    return rows


def measured(world: World, seeds: list[int]) -> list[Row]:
    """A row for each budget and seed at which a donor fits."""
    rows = []
    for seed in seeds:
        for budget in world.budgets:
            start = time.perf_counter()
            try:
                row = Round(world, seed).row(budget)
            except NotComputedError:
                continue
            took = time.perf_counter() - start
            click.echo(f"seed {seed}, {budget:.3f} ms: {took:.0f} s{'' if row else ', nothing fits'}", err=True)
            rows += [row] if row else []
    return rows


@click.command()
@click.option("--quick", is_flag=True, help="Four donors, two budgets, one seed, fewer images; the same protocol.")
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; or DERC_SHARED.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--budgets", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seed-only", type=click.IntRange(0), help="Compute this seed alone, for the work folder.")
@click.option("--known", is_flag=True, help="Report what the work folder has, compute nothing.")
@click.option("--epochs", type=click.IntRange(1), help="Of the training of everything.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/accuracy"), show_default=True)
@click.option("--plots", "folder", type=click.Path(path_type=Path), help="Write the plots there.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write machine, protocol, rows and figures.")
def main(
    quick: bool,
    zoo_dir: Path | None,
    seeds: int,
    budgets: int,
    seed_only: int | None,
    known: bool,
    epochs: int | None,
    work: Path,
    folder: Path | None,
    output: Path | None,
) -> None:
    """Compare what derc assembles with everything else at every budget, and print the table."""
    shared = cifarzoo.shared(zoo_dir)
    if shared is None or not (shared / "zoo" / "zoo.json").is_file() or not (shared / "data" / "cifar10.npz").is_file():
        raise click.UsageError("give --zoo-dir, the folder with zoo/ and data/, or set DERC_SHARED")
    torch.set_num_threads(1)
    size: Size = QUICK if quick else FULL
    size = replace(size, epochs=epochs) if epochs else size
    seeds, budgets = (1, QUICK_BUDGETS) if quick else (seeds, budgets)
    start = time.perf_counter()
    try:
        world = open_world(shared, work / size.name, size, budgets, closed=known)
        chosen = list(range(seeds)) if seed_only is None else [seed_only]
        rows = measured(world, chosen)
        donors = tuned(world, chosen)
    except DercError as error:
        raise click.ClickException(str(error)) from error
    ends = world.fastest, world.slowest
    found = figures(rows, donors, ends)
    print(table(rows), costs(rows), networks(rows), sep="\n\n")
    if folder is not None:
        for name, text in plots(rows, ends).items():
            (folder / name).write_text(text, encoding="utf-8")
    told = protocol(world, seeds) | {"seconds": round(time.perf_counter() - start)}
    give({"machine": machine(), "protocol": told, "rows": rows, "donors": donors, "figures": found}, output)


if __name__ == "__main__":
    main()
