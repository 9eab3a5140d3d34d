"""What label-free matching gives: one late stitch between two public CIFAR-10 networks of other authors.

    python benchmarks/matching.py --zoo-dir DIR [--images 3000,6000] [--json FILE]

ResNet-56 up to its second stage, then ResNet-20 from its second stage on. The stitch is random, fitted by ridge
regression, with the batch norms behind it estimated anew too, or matched further with images shown; 3,000 training
images without labels, 500 images decide when to stop and which batch norms stay, and accuracy is on 1,000 others.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.contexts import open_context
from benchmarks.results import give
from derc.artifacts import Assembly, BlockRef, StitchedAssembly
from derc.assembled import assemble, live, seeded
from derc.judge import correct, logits
from derc.passes.match import Match
from derc.passes.recalibrate import Recalibrate
from derc.passes.score import Consult
from derc.passes.stitch import FitStitches
from derc.pipeline import Context
from derc.zoo import Zoo

FRONT, TAIL = "akamaster_resnet56", "akamaster_resnet20"
PROBE, VALIDATION, HELDOUT = 3000, 500, 1000
STAGE = (32, 16, 16)
"""Shape of what the second stage gives."""


def open_pair(folder: Path) -> Context:
    """The two networks and the images."""
    data, _ = cifarzoo.load_data(folder / "data", PROBE, VALIDATION, 1, HELDOUT)
    zoo = cifarzoo.load_zoo(folder / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-")))
    zoo = Zoo(zoo.name, tuple(donor for donor in zoo.donors if donor.name in (FRONT, TAIL)))
    return open_context(zoo, data)


def stitched_pair(context: Context) -> Assembly:
    """The front's last value of the second stage goes to the tail's first one."""
    front, tail = context.lowered[FRONT], context.lowered[TAIL]
    last = max(number for number, cut in enumerate(front.cuts) if cut.type.shape == STAGE)
    first = min(number for number, cut in enumerate(tail.cuts) if cut.type.shape == STAGE)
    return Assembly((BlockRef(FRONT, 0, last, 0), BlockRef(TAIL, first, len(tail.units), 1)))


def accuracy(context: Context, network: nn.Module) -> float:
    right = correct(logits(network, context.data.heldout), context.data.heldout, tuple(range(10)))
    assert right is not None
    return round(float(right.mean()), 4)


def rows(context: Context, shown: list[int]) -> list[dict[str, Any]]:
    """A row for each state of the stitch."""
    assembly = stitched_pair(context)
    intact = accuracy(context, context.lowered[TAIL].program)
    found: list[dict[str, Any]] = [{"stitch": f"none: {TAIL}", "accuracy": intact}]
    with seeded(0):
        found.append({"stitch": "random", "accuracy": accuracy(context, assemble(assembly, context.lowered))})
    start = time.perf_counter()
    ridge: StitchedAssembly = FitStitches().run(context, assembly)
    seconds = round(time.perf_counter() - start, 2)
    found.append({"stitch": "ridge", "accuracy": accuracy(context, live(ridge, context.lowered)), "seconds": seconds})
    start = time.perf_counter()
    better = Recalibrate().run(context, ridge, Consult().run(context))
    seconds = round(time.perf_counter() - start, 2)
    value = accuracy(context, live(better, context.lowered))
    found.append({"stitch": "recalibrated", "accuracy": value, "seconds": seconds})
    for images in shown:
        matched = Match(images=images).run(context, better)
        value = accuracy(context, live(matched.stitched, context.lowered))
        agreement = {"before": round(matched.before, 4), "agreement": round(matched.after, 4)}
        found.append({"stitch": f"matched {images}", "accuracy": value, "seconds": matched.seconds, **agreement})
    return found


@click.command()
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; or DERC_SHARED.")
@click.option("--images", default="3000,6000", show_default=True, help="Images shown.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write machine, protocol, rows and figures.")
def main(zoo_dir: Path | None, images: str, output: Path | None) -> None:
    """Print accuracy for each state of the stitch."""
    folder = cifarzoo.shared(zoo_dir)
    if folder is None:
        raise click.UsageError("give --zoo-dir, the folder with zoo/ and data/, or set DERC_SHARED")
    torch.set_num_threads(1)
    context = open_pair(folder)
    found = rows(context, [int(count) for count in images.split(",")])
    for row in found:
        click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
    figures = {row["stitch"].split(":")[0]: row["accuracy"] for row in found}
    give({"machine": platform.platform(), "protocol": __doc__, "rows": found, "figures": figures}, output)


if __name__ == "__main__":
    main()
