"""Learning rates of the accuracy benchmark: validation accuracy on a development split that no seed has.

    python benchmarks/accuracy_rates.py --zoo-dir DIR [--work DIR] [--places 3,7]

The development split is drawn with a seed of its own, at two of the ten budgets. Each kind of training is run at each
rate and the rate of the best mean validation accuracy is for RATES or the size; held-out images are not read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.accuracy_choices import Choice, choose
from benchmarks.accuracy_networks import FROZEN, Lesson, Net, paper_net, random_net, teach
from benchmarks.accuracy_rounds import Round
from benchmarks.accuracy_world import World, open_world
from benchmarks.accuracy_zoo import FULL

DEVELOPMENT = 1000
"""The seed of the development split."""
GRID = {
    FROZEN: [(1e-3, "train"), (3e-3, "train"), (1e-2, "train")],
    "distilled": [(3e-5, "fixed"), (1e-4, "fixed"), (3e-4, "fixed")],
    "random": [(3e-4, "train"), (1e-3, "train")],
    "paper": [(1e-3, "train"), (3e-3, "train")],
    "scratch": [(3e-3, "train"), (1e-2, "train")],
}
"""Rates that were tried last, with the treatment of batch norms; higher ones were worse at the first budget."""


def starts(world: World, choice: Choice) -> dict[str, Callable[[], Net]]:
    """How a network of each kind begins: an assembly, random stitches and the paper's with frozen blocks trained."""
    assert choice.assembly is not None and choice.paper is not None
    assembly, paper, one = choice.assembly, choice.paper, Round(world, DEVELOPMENT)

    def warm(net: Net, epochs: int) -> Net:
        teach(net, world.context(DEVELOPMENT).data, world.size.train, one.frozen(epochs))
        return net

    lowered, fresh = world.lowered, world.fresh
    return {
        FROZEN: lambda: one.stitched(assembly, "stage2"),
        "distilled": lambda: one.donor_net(choice.donor),
        "random": lambda: warm(random_net(assembly, lowered, DEVELOPMENT), 2),
        "paper": lambda: warm(paper_net(paper, lowered, fresh, DEVELOPMENT), 2),
        "scratch": lambda: random_net(assembly, fresh, DEVELOPMENT),
    }


@click.command()
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; or DERC_SHARED.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/accuracy"), show_default=True)
@click.option("--places", default="3,7", show_default=True, help="Budgets, by number of ten.")
def main(zoo_dir: Path | None, work: Path, places: str) -> None:
    """Print validation accuracy by kind and rate."""
    shared = cifarzoo.shared(zoo_dir)
    if shared is None:
        raise click.UsageError("give --zoo-dir, the folder with zoo/ and data/, or set DERC_SHARED")
    torch.set_num_threads(1)
    world = open_world(shared, work / FULL.name, FULL, 10)
    found: dict[tuple[str, float, str], list[float]] = {}
    for place in places.split(","):
        choice = choose(world, DEVELOPMENT, world.budgets[int(place)])
        if choice is None or choice.assembly is None or choice.paper is None:
            raise click.UsageError(f"nothing fits at budget {place}: give another of --places")
        click.echo(f"{place}: {choice.donor}, {choice.assembly}")
        for kind, start in starts(world, choice).items():
            epochs = world.size.epochs + 2 * (kind in ("distilled", "scratch"))
            for given in GRID[kind]:
                lesson = Lesson(kind, 1 if kind == FROZEN else epochs, DEVELOPMENT, given=given)
                trained = teach(start(), world.context(DEVELOPMENT).data, world.size.train, lesson)
                best = max(float(row["validation_accuracy"] or 0) for row in trained.rows)
                found.setdefault((kind, *given), []).append(best)
                before, seconds = trained.before.accuracy, trained.seconds
                click.echo(f"{kind} {given[0]:g} {given[1]}: {before:.3f} > {best:.3f} ({seconds:.0f} s)")
    for (kind, rate, norms), values in found.items():
        click.echo(f"{kind} {rate:g} {norms}: {mean(values):.4f}")


if __name__ == "__main__":
    main()
