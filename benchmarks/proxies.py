"""Proxies: how well each foretells what a random assembly is worth after the same short fine-tuning, and what it costs.

    python benchmarks/proxies.py [--quick] [--zoo-dir DIR] [--only digits|cifar] [--json result.json]

Random assemblies of the embedded zoo, and with --zoo-dir (or DERC_SHARED) of the ten CIFAR-10 networks of a shared
folder: blocks spread evenly, stitches fitted in closed form on the probe images as a compile does. Each is judged by
every proxy, with labels and, where it uses them, with the donors' consensus in their place. Then each is fine-tuned
whole, with the same optimiser and images, and tested on images that no proxy, stitch or fine-tuning has seen. Printed:
Spearman's and Kendall's rank correlation with 95% bootstrap intervals over assemblies, with accuracy after and before
fine-tuning, and processor seconds per network on one thread. What needs no network stands beside them: parameters,
multiply-accumulates, the stitches' residual and the loss that selection assumes before it has seen anything.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, rankdata
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.contexts import open_context
from benchmarks.results import give, machine
from derc import layered, registry
from derc.artifacts import Array, Assembly, Consensus, StitchedAssembly
from derc.assembled import assemble, seeded
from derc.compiler import Analysis, analyse
from derc.config import CompileSettings
from derc.data import Data, Split
from derc.digits import load_split
from derc.images import resize
from derc.judge import beliefs, columns_of, consensus, logits
from derc.layered import Layered
from derc.learnt import prior_loss
from derc.passes.stitch import FitStitches
from derc.pipeline import Context, Timings
from derc.sampling import sample
from derc.scoring import open_proxy
from derc.scoring.evidence import ANSWERS, Evidence, Subject, gather
from derc.zoo import Zoo

ON_LABELS = ("accuracy", *(name for name in registry.PROXIES if ANSWERS in open_proxy(name).needs))
"""Proxies that use labels, and are tried without them too."""
FREE = ("params", "macs", "residual", "prior")
BOOTSTRAPS = 2000
SEED = 20221103


@dataclass(frozen=True)
class Tuning:
    """The fine-tuning that every assembly gets: AdamW on all parameters in train mode, mean of `runs` orders."""

    epochs: int
    rate: float
    batch: int = 32
    runs: int = 2


@dataclass(frozen=True)
class World:
    """A zoo, analysed, with training images that neither probes nor validation hold."""

    name: str
    context: Context
    analysis: Analysis
    train: Split
    tuning: Tuning

    @property
    def graph(self) -> Layered:
        heads = self.context.data.task_donors(self.context.zoo)
        return layered.build(self.analysis.cuts, self.analysis.partition, heads)


def digits(quick: bool) -> World:
    """The embedded zoo and its own splits."""
    data = Data.load("digits", probe=300)
    images, labels = load_split("train")
    train = Split(resize(images, (3, 32, 32)), labels)
    return open_world("digits", Zoo.load("digits"), data, train, Tuning(3, 3e-4, runs=1 if quick else 2))


def cifar(folder: Path, quick: bool) -> World:
    """The ten CIFAR-10 networks."""
    sizes = (256, 300, 256, 500) if quick else (256, 500, 512, 1000)
    data, train = cifarzoo.load_data(folder / "data", *sizes)
    return open_world(
        "cifar",
        cifarzoo.load_zoo(folder / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-"))),
        data,
        train,
        Tuning(3, 3e-4, runs=1),
    )


def open_world(name: str, zoo: Zoo, data: Data, train: Split, tuning: Tuning) -> World:
    """The zoo cut and partitioned with a compile's default options, in a store of its own."""
    context = open_context(zoo, data)
    return World(name, context, analyse(context, CompileSettings(), Timings()), train, tuning)


def consult(context: Context, *, labelled: bool) -> tuple[Data, Consensus]:
    """The data with or without its labels, and what the donors that know the task believe."""
    data, names = context.data, context.data.task_donors(context.zoo)
    columns = {name: columns_of(context.zoo[name].labels, data) for name in names}
    donors = [(context.lowered[name], columns[name]) for name in names]
    if labelled:
        return data, Consensus(np.zeros(0, np.int64), beliefs(donors, data.probe))
    bare = Data(data.name, None, *(Split(s.images, None) for s in (data.probe, data.validation, data.heldout)))
    answers = consensus([donor for donor, _ in donors], bare.validation)
    return bare, Consensus(answers, beliefs([(donor, None) for donor, _ in donors], bare.probe))


def examine(world: World, assembly: Assembly, views: dict[bool, tuple[Data, Consensus]]) -> dict[str, Any]:
    """One assembly: what the proxies say of it, the processor seconds of each, and its test accuracies."""
    context = world.context
    start = time.process_time()
    stitched = FitStitches().run(context, assembly)
    fitted = time.process_time() - start
    network = assemble(assembly, context.lowered, stitched.states, stitched.head)
    labels = context.zoo[assembly.blocks[-1].donor].labels
    values, seconds = dict[str, float](), dict[str, float]()
    for labelled, (data, answers) in views.items():
        evidence = gather(data, labels, answers)
        for name in registry.PROXIES if labelled else ON_LABELS:
            key = name if labelled else f"{name}_unlabelled"
            start = time.process_time()
            values[key] = open_proxy(name).measure(Subject(network, partial(logits, network)), evidence)
            seconds[key] = time.process_time() - start
    evidence = gather(context.data, labels, views[True][1])
    runs = [tuned(world, network, evidence, seed) for seed in range(world.tuning.runs)]
    return {
        "zoo": world.name,
        "assembly": str(assembly),
        "proxies": values | free(world, stitched),
        "seconds": seconds,
        "stitch_s": round(fitted, 3),
        "untuned": right(network, context.data.heldout, evidence),
        "tuned": float(np.mean([accuracy for accuracy, _ in runs])),
        "runs": [accuracy for accuracy, _ in runs],
        "tune_s": round(float(np.mean([took for _, took in runs])), 3),
    }


def free(world: World, stitched: StitchedAssembly) -> dict[str, float]:
    """What is known of an assembly before it is a network."""
    graph, analysis = world.graph, world.analysis
    path = graph.path(stitched.assembly) or ()
    loss = prior_loss(graph, analysis.cuts, analysis.embedded)
    costs = graph.costs(path)
    residual = -sum(stitched.residual)
    return {"params": costs["params"], "macs": costs["macs"], "residual": residual, "prior": -loss[list(path)].sum()}


def right(network: nn.Module, split: Split, evidence: Evidence) -> float:
    """Accuracy on a split."""
    return float((evidence.picked(logits(network, split)).argmax(1).numpy() == split.labels).mean())


def tuned(world: World, network: nn.Module, evidence: Evidence, seed: int) -> tuple[float, float]:
    """Test accuracy after the fine-tuning, of a copy, and the processor seconds of training."""
    student, tuning = copy.deepcopy(network), world.tuning
    start = time.process_time()
    with seeded(seed):
        train(student, world.train, evidence, tuning)
    took = time.process_time() - start
    return right(student, world.context.data.heldout, evidence), took


def train(student: nn.Module, split: Split, evidence: Evidence, tuning: Tuning) -> None:
    """Train in place: cosine decay of the rate, an order drawn from torch's random state."""
    images, labels = next(split.batches(len(split)))
    if labels is None:
        raise ValueError("fine-tuning needs labels")
    steps = tuning.epochs * (len(split) // tuning.batch)
    optimizer = torch.optim.AdamW(student.parameters(), lr=tuning.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.train()
    for _ in range(tuning.epochs):
        order = torch.randperm(len(split))
        for number in range(len(split) // tuning.batch):
            chosen = order[number * tuning.batch : (number + 1) * tuning.batch]
            loss = F.cross_entropy(evidence.picked(student(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def spearman(x: Array, y: Array) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one side is constant."""
    a, b = rankdata(x), rankdata(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def kendall(x: Array, y: Array) -> float:
    """Kendall's tau-b; 0 where one side is constant."""
    found = float(kendalltau(rankdata(x), rankdata(y)).statistic)
    return 0.0 if np.isnan(found) else found


def interval(statistic: Callable[[Array], float], count: int) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of drawn rows."""
    rng = np.random.default_rng(SEED)
    found = [statistic(rng.integers(0, count, count)) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(found, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def judged(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One proxy on one zoo: correlations with their intervals, what its best five are worth, seconds per network."""
    x = np.array([row["proxies"][name] for row in rows])
    y, z = (np.array([row[key] for row in rows]) for key in ("tuned", "untuned"))
    base = np.array([row["proxies"]["accuracy"] for row in rows])
    seconds = [row["seconds"].get(name, 0.0) for row in rows]
    best = np.argsort(-rankdata(x, method="ordinal"), kind="stable")[:5]
    count = len(rows)
    return {
        "zoo": rows[0]["zoo"],
        "proxy": name,
        "spearman": round(spearman(x, y), 4),
        "spearman_ci95": interval(lambda i: spearman(x[i], y[i]), count),
        "kendall": round(kendall(x, y), 4),
        "kendall_ci95": interval(lambda i: kendall(x[i], y[i]), count),
        "over_accuracy_ci95": interval(lambda i: spearman(x[i], y[i]) - spearman(base[i], y[i]), count),
        "untuned_spearman": round(spearman(x, z), 4),
        "untuned_spearman_ci95": interval(lambda i: spearman(x[i], z[i]), count),
        "untuned_kendall": round(kendall(x, z), 4),
        "best_five": round(float(y[best].mean()), 4),
        "seconds": round(float(np.median(seconds)), 4),
    }


def text(found: list[dict[str, Any]]) -> str:
    """The table, best proxy first."""
    names = ("proxy", "Spearman", "95%", "Kendall", "95%", "minus accuracy's, 95%", "untuned: Spearman", "Kendall")
    names += ("tuned accuracy of its best five", "s per network")
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for one in sorted(found, key=lambda one: -one["spearman"]):
        spans = [f"{one[key][0]:+.2f} … {one[key][1]:+.2f}" for key in ("spearman_ci95", "kendall_ci95")]
        over = "" if one["proxy"] == "accuracy" else "{:+.2f} … {:+.2f}".format(*one["over_accuracy_ci95"])
        took = "" if one["proxy"] in FREE else f"{one['seconds']:.2f}"
        cells = (one["proxy"], f"{one['spearman']:+.3f}", spans[0], f"{one['kendall']:+.3f}", spans[1], over)
        cells += (f"{one['untuned_spearman']:+.3f}", f"{one['untuned_kendall']:+.3f}", f"{one['best_five']:.3f}", took)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each proxy's mean over the zoos, and its figures on each."""
    result: dict[str, float] = {}
    for name in dict.fromkeys(one["proxy"] for one in found):
        mine = [one for one in found if one["proxy"] == name]
        for key in ("spearman", "kendall", "untuned_spearman", "seconds"):
            if key != "seconds" or name not in FREE:
                result[f"{name}_{key}"] = round(float(np.mean([one[key] for one in mine])), 4)
        result |= {f"{one['zoo']}_{name}_spearman": one["spearman"] for one in mine}
    for zoo in dict.fromkeys(row["zoo"] for row in rows):
        runs = np.array([row["runs"] for row in rows if row["zoo"] == zoo])
        result[f"{zoo}_assemblies"] = len(runs)
        if runs.shape[1] > 1:
            result[f"{zoo}_repeat_spearman"] = round(spearman(runs[:, 0], runs[:, 1]), 4)
    return result


def run(world: World, count: int, state: Path | None) -> list[dict[str, Any]]:
    """Examine `count` random assemblies; those in the `state` file are taken from there, new ones are added to it."""
    assemblies = sample(world.graph, count, SEED)
    views = {labelled: consult(world.context, labelled=labelled) for labelled in (True, False)}
    lines = state.read_text(encoding="utf-8").splitlines() if state and state.is_file() else []
    known = {(row["zoo"], row["assembly"]): row for row in map(json.loads, lines)}
    rows = []
    for number, assembly in enumerate(assemblies):
        one = known.get((world.name, str(assembly))) or examine(world, assembly, views)
        rows.append(one)
        if state and (world.name, str(assembly)) not in known:
            with state.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")
        click.echo(
            f"{world.name} {number + 1}/{len(assemblies)} {assembly}: {one['untuned']:.3f} to {one['tuned']:.3f}, "
            f"stitches {one['stitch_s']} s, proxies {sum(one['seconds'].values()):.1f} s, tuning {one['tune_s']} s",
            err=True,
        )
    return rows


@click.command()
@click.option("--quick", is_flag=True, help="24 assemblies a zoo, one fine-tuning each.")
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/ of the CIFAR networks.")
@click.option("--only", type=click.Choice(["digits", "cifar"]))
@click.option("--count", type=int, help="Assemblies per zoo.  [default: 64]")
@click.option("--state", type=click.Path(path_type=Path), help="Keeps what is done, to go on after an interruption.")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    quick: bool, zoo_dir: Path | None, only: str | None, count: int | None, state: Path | None, output: Path | None
) -> None:
    """Judge, fine-tune, correlate; print tables, and write everything as JSON."""
    torch.set_num_threads(1)
    shared = cifarzoo.shared(zoo_dir)
    makers = {"digits": partial(digits, quick)}
    if shared is not None:
        makers["cifar"] = partial(cifar, shared, quick)
    rows, found, protocol = list[dict[str, Any]](), list[dict[str, Any]](), dict[str, Any]()
    for name, make in makers.items():
        if only not in (None, name):
            continue
        world = make()
        mine = run(world, count or (24 if quick else 64), state)
        data = world.context.data
        sizes = {"probe": data.probe, "validation": data.validation, "train": world.train, "test": data.heldout}
        protocol[name] = {**{k: len(split) for k, split in sizes.items()}, **vars(world.tuning), "optimizer": "AdamW"}
        rows += mine
        found += [judged(mine, proxy) for proxy in mine[0]["proxies"]]
        click.echo(
            f"\n{name}: {len(mine)} assemblies, {protocol[name]}\n" + text([o for o in found if o["zoo"] == name])
        )
    result = {
        "machine": machine(),
        "protocol": {"quick": quick, "seed": SEED, "threads": 1, "zoos": protocol},
        "rows": found,
        "assemblies": rows,
        "figures": figures(found, rows),
    }
    give(result, output)


if __name__ == "__main__":
    main()
