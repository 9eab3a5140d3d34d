"""Whether block-local distillation pays on assemblies that leave much of their donors out.

    python benchmarks/blockwise.py [--quick] [--zoo-dir DIR] [--json FILE]

Assemblies of the embedded digits zoo and, with --zoo-dir (or DERC_SHARED), of CIFAR-10 networks of other authors: one
donor without most of its blocks, and blocks of three donors of different families. Every way is shown as many images,
two passes: stitches in closed form alone (which is where all others begin); stitches matched without labels; every
block taught by its own donor (`derc finetune --blockwise`), without labels too; the one after the other, a pass each;
fine-tuning with labels; and blocks taught for a pass, then fine-tuning for a pass. Fine-tuning has the rate of two, and
everything the state, that is best on the validation images; accuracy is on held-out ones. One seed.
"""

from __future__ import annotations

import copy
import os
import platform
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.contexts import open_context
from benchmarks.results import give
from derc import blockwise
from derc.artifacts import Assembly, BlockRef, StitchedAssembly
from derc.assembled import live
from derc.data import Data, Split
from derc.parts import parts
from derc.passes.match import Match
from derc.passes.stitch import FitStitches
from derc.pipeline import Context
from derc.training import TrainOptions, train
from derc.training.examples import as_examples
from derc.training.freeze import everything
from derc.training.lessons import Place, chosen, lesson
from derc.training.score import scored
from derc.zoo import Zoo

DIGITS = (
    "resnet-slim[0:2] | convnext[7:10] | convnext[13:15]",
    "effnet[0:3] | resnet-slim[3:4] | convnext[8:9] | convnext[13:15]",
    "convnext[0:2] | swin[4:6] | resnet-slim[5:9]",
)
CIFAR = (
    "akamaster_resnet32[0:2] | akamaster_resnet32[6:8] | akamaster_resnet32[11:13] | akamaster_resnet32[15:16]",
    "akamaster_resnet56[0:3] | vainf_resnet56_pruned[11:13] | akamaster_resnet20[8:10]",
    "ai85_nascifarnet[0:2] | tiniest[5:6] | akamaster_resnet20[8:10]",
)
"""Donors' cuts are counted as `derc zoo` shows them."""
PROBE, VALIDATION, HELDOUT, MORE = 1000, 500, 2000, 500
PASSES = 2
RATES = 1e-3, 3e-3
WAYS = ("ridge", "matched", "blockwise", "matched, blockwise", "full", "blockwise, full")
LABELLED = ("full", "blockwise, full")


@dataclass(frozen=True)
class World:
    """Donors, the images that everything is shown, and how an assembly becomes a network."""

    name: str
    context: Context
    train: Split

    def network(self, stitched: StitchedAssembly) -> nn.Sequential:
        """A copy of its own, with the names of an emitted network."""
        every = parts(stitched.assembly, self.context.lowered)
        modules = copy.deepcopy(live(stitched, self.context.lowered)).parts
        return nn.Sequential(OrderedDict((part.name, one) for part, one in zip(every, modules, strict=True)))

    def ridge(self, assembly: Assembly) -> StitchedAssembly:
        return FitStitches().run(self.context, assembly)

    def matched(self, stitched: StitchedAssembly, passes: int) -> StitchedAssembly:
        return Match(images=passes * len(self.train)).run(self.context, stitched).stitched

    def taught(self, stitched: StitchedAssembly, passes: int) -> nn.Sequential:
        """Every block behind a stitch taught by its donor, the rest as in `derc finetune`."""
        network, donors = self.network(stitched), self.context.lowered
        blocks = stitched.assembly.blocks
        before = [(f"stitch{n}",) if stitched.assembly.joint(n) else () for n in range(len(blocks))]
        places = tuple(Place(n, block, before[n]) for n, block in enumerate(blocks))
        with tempfile.TemporaryDirectory() as folder:
            course = blockwise.Course(
                network,
                tuple(lesson(places, place, donors, fits=True) for place in chosen(places)),
                places,
                as_examples(self.train),
                as_examples(self.context.data.validation),
                TrainOptions(epochs=passes, batch=32, lr=blockwise.RATE),
                everything,
                Path(folder),
                {},
            )
            blockwise.learn(course, _alone, 1, 1, None, allow_worse=False, say=lambda _: None)
        return network

    def tuned(self, network: nn.Module, passes: int) -> nn.Module:
        """All of it trained with labels, at the rate that is best on the validation images."""
        validation, every = self.context.data.validation, []
        for rate in RATES:
            one = copy.deepcopy(network)
            found = train(one, self.train, validation, TrainOptions(epochs=passes, batch=32, lr=rate))
            every.append((found.after.rank, rate, found.network))
        return max(every, key=lambda one: one[:2])[2]

    def accuracy(self, network: nn.Module) -> float:
        return round(scored(network, as_examples(self.context.data.heldout)).accuracy, 4)


def _alone(block: str, threads: int) -> Any:
    raise AssertionError("one process teaches all blocks")


def assembly(text: str) -> Assembly:
    """From ``donor[first:last] | …``."""
    blocks = []
    for number, word in enumerate(text.split(" | ")):
        donor, _, span = word.partition("[")
        first, last = span[:-1].split(":")
        blocks.append(BlockRef(donor, int(first), int(last), number))
    return Assembly(tuple(blocks))


def digits(quick: bool) -> tuple[World, tuple[str, ...]]:
    context = open_context(
        Zoo.load("digits", check=lambda _: None), Data.load("digits", input_size=(3, 32, 32), probe=512, seed=0)
    )
    return World("digits", context, context.data.training(MORE if quick else 2000)), DIGITS[1:2] if quick else DIGITS


def cifar(shared: Path, quick: bool) -> tuple[World, tuple[str, ...]]:
    data, _ = cifarzoo.load_data(shared / "data", MORE if quick else PROBE, VALIDATION, 1, HELDOUT)
    zoo = cifarzoo.load_zoo(shared / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-")))
    return World("cifar", open_context(zoo, data), data.probe), CIFAR[:1] if quick else CIFAR


def row(world: World, text: str) -> dict[str, Any]:
    """Held-out accuracy, and seconds, of each way for one assembly."""
    start = time.perf_counter()
    ridge = world.ridge(assembly(text))
    fitted = time.perf_counter() - start
    half = PASSES // 2
    ways: dict[str, Callable[[], nn.Module]] = {
        "ridge": lambda: world.network(ridge),
        "matched": lambda: world.network(world.matched(ridge, PASSES)),
        "blockwise": lambda: world.taught(ridge, PASSES),
        "matched, blockwise": lambda: world.taught(world.matched(ridge, half), half),
        "full": lambda: world.tuned(world.network(ridge), PASSES),
        "blockwise, full": lambda: world.tuned(world.taught(ridge, half), half),
    }
    found: dict[str, Any] = {"zoo": world.name, "assembly": text, "images": PASSES * len(world.train)}
    donors = {name: world.accuracy(world.context.lowered[name].program) for name in assembly(text).donors}
    found |= {"donors": donors, "accuracy": {}, "seconds": {"fit": round(fitted, 1)}}
    for name, make in ways.items():
        start = time.perf_counter()
        found["accuracy"][name] = world.accuracy(make())
        found["seconds"][name] = round(time.perf_counter() - start, 1)
    return found


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the assemblies, and how often one way is above another."""
    every = {name: np.array([one["accuracy"][name] for one in rows]) for name in WAYS}
    means = {f"mean_{name.replace(', ', '_then_')}": round(float(values.mean()), 4) for name, values in every.items()}
    return {
        **means,
        "assemblies": len(rows),
        "blockwise_above_ridge": int((every["blockwise"] > every["ridge"]).sum()),
        "blockwise_above_matched": int((every["blockwise"] > every["matched"]).sum()),
        "blockwise_above_full": int((every["blockwise"] > every["full"]).sum()),
        "blockwise_then_full_above_full": int((every["blockwise, full"] > every["full"]).sum()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| assembly | images | donors | {' | '.join(WAYS)} |", f"|{' --- |' * (3 + len(WAYS))}"]
    for one in rows:
        values = " | ".join(f"{100 * one['accuracy'][name]:.1f}" for name in WAYS)
        donors = ", ".join(f"{100 * value:.1f}" for value in one["donors"].values())
        lines.append(f"| {one['assembly'].replace(' | ', ' + ')} | {one['images']} | {donors} | {values} |")
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="One assembly of each zoo, 500 images.")
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; or DERC_SHARED.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write machine, protocol, rows and figures.")
def main(quick: bool, zoo_dir: Path | None, output: Path | None) -> None:
    """Print held-out accuracy of every way for every assembly."""
    torch.set_num_threads(1)
    shared, start = cifarzoo.shared(zoo_dir), time.time()
    worlds = [digits(quick)] + ([] if shared is None else [cifar(shared, quick)])
    rows = []
    for world, texts in worlds:
        for text in texts:
            rows.append(row(world, text))
            print(table(rows[-1:]).splitlines()[-1], rows[-1]["seconds"], file=sys.stderr, flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    protocol = {"text": __doc__, "quick": quick, "threads": 1, "seconds": round(time.time() - start)}
    print(table(rows))
    give({"machine": machine, "protocol": protocol, "rows": rows, "figures": figures(rows)}, output)


if __name__ == "__main__":
    main()
