"""Labels that no donor knows: what derc assembles, without training and with little, against donors and others.

    python benchmarks/transfer.py [--quick] [--zoo-dir DIR] [--task NAME] [--work DIR] [--json FILE]

Three tasks (benchmarks/transfer_tasks.py): networks that know one half of CIFAR-10's classes each on all ten, public
CIFAR-10 networks on digits, and the embedded digits networks, which need no --zoo-dir (or DERC_SHARED), on digits that
lie on their side. Budgets are multiply-accumulates, quantiles of the donors', so that a busy machine changes nothing.
Every donor gets a head in closed form; what is compared then, and how it is trained, is as in benchmarks/accuracy.py,
but the donors are trained from the state in which a compile gives them. Validation images choose, held-out ones are
reported. Everything that was computed stays in --work, so that a run that was cut off goes on.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.accuracy_figures import Row
from benchmarks.accuracy_networks import BATCH, RATES
from benchmarks.accuracy_world import NotComputedError
from benchmarks.results import give, machine
from benchmarks.transfer_figures import figures
from benchmarks.transfer_tables import networks, spent, table
from benchmarks.transfer_tasks import FULL, QUICK, Task, tasks
from benchmarks.transfer_world import TransferRound, open_world
from derc.errors import DercError


def measured(every: list[Task], work: Path, *, known: bool) -> list[Row]:
    """A row for each budget of a task and a seed at which a donor fits; each seed has all tasks before the next."""
    rows: list[Row] = []
    for seed in range(max(one.seeds for one in every)):
        for task in (one for one in every if seed < one.seeds):
            with suppress(NotComputedError):
                rows += measured_seed(task, seed, work / f"{task.name}-{task.size.name}", known=known)
    return sorted(rows, key=lambda row: ([one.name for one in every].index(row["task"]), row["m_macs"], row["seed"]))


def measured_seed(task: Task, seed: int, folder: Path, *, known: bool) -> list[Row]:
    """A seed's rows; where `known`, those alone that were computed before."""
    start, rows = time.perf_counter(), list[Row]()
    world = open_world(task, seed, folder, closed=known)
    say(f"{task.name}, seed {seed}: heads and analysis", start)
    for budget in world.budgets:
        start = time.perf_counter()
        with suppress(NotComputedError):
            row = TransferRound(world, seed).row(budget)
            rows += [named(task.name, row)] if row else []
        say(f"{task.name}, seed {seed}, {budget:g} M MACs", start)
    return rows


def say(what: str, start: float) -> None:
    click.echo(f"{what}: {time.perf_counter() - start:.0f} s", err=True)


def named(task: str, row: Row) -> Row:
    """The row with what its amounts are: where the shared code says ms, a ms is a million multiply-accumulates."""
    kept = {key.removesuffix("_ms") + "_m_macs" if key.endswith("_ms") else key: value for key, value in row.items()}
    budget = kept.pop("budget_m_macs")
    return {"task": task, "m_macs": budget, "place": f"{task} {budget:g}", **kept}


def protocol(every: list[Task], seconds: float) -> dict[str, Any]:
    """What was compared, on how many images."""
    told = {
        task.name: {
            "donors": {donor.name: list(donor.labels or ()) for donor in task.zoo.donors},
            "size": asdict(task.size),
            "quantiles": task.quantiles,
            "seeds": task.seeds,
        }
        for task in every
    }
    return {"tasks": told, "rates": RATES, "batch": BATCH, "seconds": round(seconds), "text": __doc__}


@click.command()
@click.option("--quick", is_flag=True, help="Fewer donors and images, one budget and seed; the same comparisons.")
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; or DERC_SHARED.")
@click.option("--task", "only", multiple=True, type=click.Choice(list(FULL)), help="This one alone; may be repeated.")
@click.option("--known", is_flag=True, help="Report what the work folder has, compute nothing.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/transfer"), show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write machine, protocol, rows and figures.")
def main(
    quick: bool, zoo_dir: Path | None, only: tuple[str, ...], known: bool, work: Path, output: Path | None
) -> None:
    """Compare what derc assembles for labels that no donor knows with everything else, and print the tables."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        plans = {name: plan for name, plan in (QUICK if quick else FULL).items() if not only or name in only}
        every = tasks(cifarzoo.shared(zoo_dir), work, plans)
        if not every:
            raise click.UsageError("give --zoo-dir, the folder with zoo/ and data/: these tasks need it")
        rows = measured(every, work, known=known)
    except DercError as error:
        raise click.ClickException(str(error)) from error
    print(table(rows), networks(rows), spent(rows), sep="\n\n")
    told = protocol(every, time.perf_counter() - start)
    give({"machine": machine(), "protocol": told, "rows": rows, "figures": figures(rows)}, output)


if __name__ == "__main__":
    main()
