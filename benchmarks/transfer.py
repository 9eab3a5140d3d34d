"""Labels that no donor knows: the best intact donor with a fitted head against the best assembly, by budget.

    python benchmarks/transfer.py [--quick] [--zoo-dir DIR] [--evaluations 16] [--json FILE]

Tasks: digits on their side in two classes for the embedded donors, and with --zoo-dir (or DERC_SHARED) CIFAR-10
networks on animals against vehicles and on digits, and the embedded donors on CIFAR-10's images. Budgets are
multiply-accumulates, quantiles of the donors', so that a busy machine changes nothing. Heads are fitted to 512 probe
images and up to 1536 more; validation images choose, held-out ones are reported, and no donor has seen any of them with
these labels. Nothing is trained.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.contexts import open_context
from benchmarks.results import give, machine
from derc.artifacts import Array
from derc.assembled import live
from derc.compiler import Prepared, analyse, latencies, open_search
from derc.config import CompileSettings
from derc.data import Data, Split
from derc.digits import load_all
from derc.images import resize
from derc.judge import logits
from derc.pipeline import Timings
from derc.search import Judged, Search
from derc.transfer import with_heads
from derc.zoo import Zoo

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VEHICLES = (0, 1, 8, 9)
UNEXPORTED = ("ai85_nascifarnet",)
"""torch's exporter cannot bring its clamp with an integer and a float bound to ONNX, so it has no latency."""
PROBE, MORE, VALIDATION, HELDOUT = 512, 1536, 1000, 2000
QUANTILES, QUICK_QUANTILES = (0.25, 0.5, 0.75, 1.0), (0.5, 1.0)


@dataclass(frozen=True)
class Task:
    """Donors, and images with labels that none of them knows."""

    name: str
    zoo: Zoo
    data: Data


def tasks(shared: Path | None, seed: int, *, quick: bool) -> list[Task]:
    """What can be asked with the data at hand."""
    own = Zoo.load("digits", check=lambda _: None)
    images, labels = load_all()
    images = resize(images, (3, 32, 32))
    sideways = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
    found = [Task("digits: sideways, low or high", own, split(sideways, labels // 5, ("low", "high"), seed))]
    if shared is None:
        return found
    every = cifarzoo.load_zoo(shared / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-")))
    cifar = replace(every, donors=tuple(one for one in every.donors if one.name not in UNEXPORTED))
    with np.load(shared / "data" / "cifar10.npz", allow_pickle=False) as arrays:
        x, y = arrays["x_test"], arrays["y_test"].astype(np.int64).ravel()
    kinds = np.isin(y, VEHICLES).astype(np.int64)
    found.append(Task("cifar: digits", cifar, split(images, labels, NAMES, seed)))
    if not quick:
        found.append(Task("cifar: animal or vehicle", cifar, split(x, kinds, ("animal", "vehicle"), seed)))
        found.append(Task("digits: CIFAR-10", own, split(x, y, cifarzoo.CLASSES, seed)))
    return found


def split(images: Array, labels: Array, classes: tuple[str, ...], seed: int) -> Data:
    """Shuffled splits; where there are fewer images than wanted, each gets its share."""
    order = np.random.default_rng(seed).permutation(len(images))
    want = np.array([PROBE, MORE, VALIDATION, HELDOUT])
    ends = np.cumsum((want * min(1.0, len(images) / want.sum())).astype(int))
    parts = [Split(images[part], labels[part]) for part in np.split(order[: ends[-1]], ends[:-1])]
    probe, more, validation, heldout = parts
    return Data("transfer", classes, probe, validation, heldout, more.first)


def prepared(task: Task, seed: int, profile_s: float) -> tuple[Prepared, CompileSettings]:
    """The task's zoo with fitted heads, analysed and profiled, in a store of its own."""
    settings = CompileSettings(seed=seed, profile_s=profile_s)
    started, timings = time.time(), Timings()
    contexts = with_heads([open_context(task.zoo, task.data, seed)], "auto", timings)
    analysis = analyse(contexts[0], settings, timings)
    tables = tuple(latencies(one, analysis, settings, timings) for one in contexts)
    heads = task.data.task_donors(contexts[0].zoo)
    return Prepared(contexts, heads, analysis, tables, timings, started), settings


def heldout(search: Search, one: Judged, *, own_head: bool = True) -> float:
    """Accuracy on held-out images; without its own head an assembly ends in its donor's."""
    context = search.context
    stitched = one.stitched if own_head else replace(one.stitched, head=None)
    outputs = logits(live(stitched, context.lowered), context.data.heldout).argmax(1).numpy()
    return float((outputs == context.data.heldout.labels).mean())


def row(task: Task, seed: int, search: Search, budget: float) -> dict[str, Any]:
    """The best intact donor and the answer within a budget, and what its own head is worth to the best assembly."""
    donor, best = search.best_intact(), search.best()
    assemblies = sorted(search.fitting(intact=False), key=lambda one: one.scores.value)
    top = assemblies[-1] if assemblies else None
    if donor is None or best is None:
        return {"task": task.name, "seed": seed, "macs_m": budget / 1e6}
    return {
        "task": task.name,
        "seed": seed,
        "macs_m": round(budget / 1e6, 3),
        "donor": donor.assembly.blocks[0].donor,
        "donor_validation": donor.scores.accuracy,
        "donor_heldout": heldout(search, donor),
        "answer": str(best.assembly),
        "answer_validation": best.scores.accuracy,
        "answer_heldout": heldout(search, best),
        "best_assembly": str(top.assembly) if top else None,
        "assembly_heldout": heldout(search, top) if top else None,
        "assembly_heldout_donors_head": heldout(search, top, own_head=False) if top else None,
        "method": top.stitched.head.method if top and top.stitched.head else None,
    }


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over all budgets at which a donor fits: gains in points, held out."""
    full = [one for one in rows if "donor" in one]
    if not full:
        return {"budgets": 0}
    gains = [100 * (one["answer_heldout"] - one["donor_heldout"]) for one in full]
    refits = [
        100 * (one["assembly_heldout"] - one["assembly_heldout_donors_head"]) for one in full if one["best_assembly"]
    ]
    return {
        "budgets": len(full),
        "answers_that_are_assemblies": sum(one["answer"] == one["best_assembly"] for one in full),
        "below_donor_on_validation": sum(one["answer_validation"] < one["donor_validation"] for one in full),
        "mean_gain_points": round(float(np.mean(gains)), 2),
        "worst_gain_points": round(float(np.min(gains)), 2),
        "best_gain_points": round(float(np.max(gains)), 2),
        "mean_refit_points": round(float(np.mean(refits)), 2) if refits else 0.0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = (
        "task",
        "seed",
        "M MACs",
        "best intact donor, held-out",
        "answer, held-out",
        "best assembly, own / donor's head",
    )
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for one in rows:
        if "donor" not in one:
            continue
        heads = (
            f"{one['assembly_heldout']:.3f} / {one['assembly_heldout_donors_head']:.3f}"
            if one["best_assembly"]
            else "–"
        )
        lines.append(
            f"| {one['task']} | {one['seed']} | {one['macs_m']:g} | {one['donor']} {one['donor_heldout']:.3f} "
            f"| {one['answer'].replace(' | ', ' + ')} {one['answer_heldout']:.3f} | {heads} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="Two tasks, two budgets, one seed, fewer evaluations.")
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; or DERC_SHARED.")
@click.option("--evaluations", type=int, default=16, show_default=True, help="Assemblies at each budget.")
@click.option("--seeds", type=int, default=1, show_default=True)
@click.option("--profile-s", type=float, default=10.0, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    quick: bool, zoo_dir: Path | None, evaluations: int, seeds: int, profile_s: float, output: Path | None
) -> None:
    """Compile for labels that no donor knows, and print what assemblies add."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows: list[dict[str, Any]] = []
    start = time.time()
    for seed in range(1 if quick else seeds):
        for task in tasks(cifarzoo.shared(zoo_dir), seed, quick=quick):
            ready, settings = prepared(task, seed, 4.0 if quick else profile_s)
            macs = [sum(unit.macs for unit in donor.units) for donor in ready.analysis.cuts.donors.values()]
            for share in QUICK_QUANTILES if quick else QUANTILES:
                budget = float(np.quantile(macs, share))
                count = min(evaluations, 6) if quick else evaluations
                chosen = settings.model_copy(update={"macs_g": budget / 1e9, "evaluations": count})
                search = open_search(ready, chosen, ready.timings)
                search.run()
                rows.append(row(task, seed, search, budget))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    protocol = {
        "evaluations": evaluations,
        "quick": quick,
        "images": PROBE + MORE,
        "seconds": round(time.time() - start),
    }
    print(table(rows))
    give({"machine": machine(), "protocol": protocol, "rows": rows, "figures": figures(rows)}, output)


if __name__ == "__main__":
    main()
