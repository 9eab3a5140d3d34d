"""What the decided forms of stitches are, and what they give: unexplained shares, accuracy, latency.

    python benchmarks/stitch_forms.py [--zoo-dir DIR] [--blocks 5] [--pairs 60] [--probe 512] [--json FILE]

The donors of the embedded zoo, or the CIFAR-10 networks of DIR, are cut into blocks, and the pass `stitchable` decides
the form of every stitch between them, as a compile does (`chosen`, `unexplained`). Of the pairs whose form is not the
default one, up to `--pairs` random ones a kind become networks with this single stitch, once in either form: fitted,
batch norms recalibrated where that helps, and judged by validation images, which choose no form (`accuracy`); `forced`
are pairs whose cheaper forms were refused, by how much agreement they were expected to lose. `latency` compares both
stitches alone, in interleaved rounds of one process. In the CIFAR zoo, validation images are of `x_train`, too.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
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
from derc.artifacts import Assembly, Consensus, CutZoo, Joint, Partition, StitchLosses
from derc.assembled import live
from derc.data import Data
from derc.judge import columns_of, correct, logits
from derc.measure import MeasureOptions, measure
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed
from derc.passes.lower import Lower
from derc.passes.partition import PartitionZoo
from derc.passes.recalibrate import Recalibrate
from derc.passes.score import Consult
from derc.passes.stitch import FitStitches
from derc.passes.stitchable import LEVELS, Pair, Stitchable, types
from derc.pipeline import Context
from derc.slices import Slices
from derc.stitch_forms import NEEDED, expected
from derc.stitching import PLAIN, Form, free, key
from derc.zoo import Zoo

VALIDATION = 1000
NEAR = 0.05
"""Forms that are expected to lose more agreement than this are not looked at."""


@dataclass
class World:
    """A zoo in blocks, what every form of every stitch leaves, and what was decided."""

    context: Context
    cuts: CutZoo
    partition: Partition
    reference: Consensus
    heads: tuple[str, ...]
    left: dict[Pair, dict[Form, float]]
    losses: StitchLosses
    seconds: float

    @classmethod
    def open(cls, context: Context, blocks: int) -> World:
        cuts = CutDonors().run(context, Lower().run(context))
        partition = PartitionZoo(blocks=blocks).run(context, cuts, Embed().run(context, cuts))
        started = time.perf_counter()
        losses, left = Stitchable().decide(context, cuts, partition)
        seconds, heads = time.perf_counter() - started, context.data.task_donors(context.zoo)
        return cls(context, cuts, partition, Consult().run(context), heads, left, losses, seconds)

    def form(self, pair: Pair) -> Form:
        one, other = map(StitchLosses.name, pair)
        return self.losses.forms.get(one, {}).get(other, PLAIN)

    def agreement(self, pair: Pair) -> dict[Form, float]:
        """What is expected of each form."""
        return expected(self.left[pair], LEVELS, self.losses.agreement[StitchLosses.name(pair[1])])

    def assembly(self, pair: Pair, form: Form) -> Assembly:
        """The network that goes from one cut to the other."""
        (given, taken), blocks = pair, self.partition.blocks
        front = [block for block in blocks[given.donor] if block.last <= given.cut]
        tail = [block for block in blocks[taken.donor] if block.first >= taken.cut]
        joints = (*[None] * len(front), Joint(form=form), *[None] * (len(tail) - 1))
        return Assembly((*front, *tail), () if form == PLAIN else joints)

    def accuracy(self, pair: Pair, form: Form) -> float:
        """Share of the validation images that this network answers right."""
        stitched = FitStitches().run(self.context, self.assembly(pair, form))
        network = live(Recalibrate().run(self.context, stitched, self.reference), self.context.lowered)
        columns = columns_of(self.context.zoo[pair[1].donor].labels, self.context.data)
        right = correct(logits(network, self.context.data.validation), self.context.data.validation, columns)
        assert right is not None
        return float(right.mean())


def kind(form: Form) -> str:
    """What is counted together: the map where it is not full, else the regridding."""
    return "low rank" if form.rank else form.regrid if form.map == "full" else form.map


def chosen(world: World) -> dict[str, Any]:
    """How often each form is decided for, and by what factor less is left than in the default one (geometric mean)."""
    counts, ratios = Counter[str](), defaultdict[str, list[float]](list)
    for pair, left in world.left.items():
        form = world.form(pair)
        counts[str(form) or "default"] += 1
        ratios[kind(form)].append(np.log(max(left[form], 1e-9) / max(left[PLAIN], 1e-9)))
    relative = {name: round(float(np.exp(np.mean(some))), 4) for name, some in ratios.items()}
    return {"pairs": len(world.left), "seconds": round(world.seconds, 1), "forms": dict(counts.most_common())} | {
        "left_relative": relative
    }


def compared(world: World, count: int) -> list[dict[str, Any]]:
    """Accuracies of networks with decided forms, and with forms that were refused, beside those with the default."""
    wanted = defaultdict[str, list[tuple[Pair, Form]]](list)
    for pair in world.left:
        if pair[1].donor not in world.heads:
            continue
        agreement, decided = world.agreement(pair), world.form(pair)
        best = max(agreement.values())
        for form in world.left[pair]:
            near = form.regrid == PLAIN.regrid and best - agreement[form] < NEAR
            needed = form.map == "full" and form.regrid in NEEDED and world.left[pair][form] < world.left[pair][PLAIN]
            if form == decided != PLAIN:
                wanted[f"decided {kind(form)}"].append((pair, form))
            elif form != PLAIN and (near or needed):
                wanted[f"refused {kind(form)}"].append((pair, form))
    rows, plain = [], dict[Pair, float]()
    for name, some in sorted(wanted.items()):
        for pair, form in random.Random(0).sample(some, min(count, len(some))):
            plain[pair] = plain[pair] if pair in plain else world.accuracy(pair, PLAIN)
            agreement = world.agreement(pair)
            rows.append(
                {
                    "kind": name,
                    "form": str(form),
                    "from": StitchLosses.name(pair[0]),
                    "to": StitchLosses.name(pair[1]),
                    "left_relative": world.left[pair][form] / max(world.left[pair][PLAIN], 1e-9),
                    "expected": agreement[form] - agreement[PLAIN],
                    "accuracy": world.accuracy(pair, form),
                    "default": plain[pair],
                }
            )
    return rows


def timed(world: World, rows: list[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
    """Latencies of the decided stitches alone, beside those of the default ones."""
    shapes, pairs = {}, dict[str, str]()
    for row in rows:
        pair = StitchLosses.cut(row["from"]), StitchLosses.cut(row["to"])
        ends, form = types(world.cuts, *pair), Form.parse(row["form"])
        if row["kind"].startswith("decided") and not free(*ends, form):
            pairs[key(*ends, form)] = key(*ends)
            shapes |= {key(*ends, one): (*ends, one) for one in (form, PLAIN)}
    slices = Slices(world.context, world.cuts, shapes)
    sessions = {name: world.context.builder.session(slices.stitch(name), name) for name in shapes}
    calls = {name: session.time for name, session in sessions.items()}
    if not calls:
        return []
    found = measure(calls, MeasureOptions(limit_s=limit_s, level=True), anchor=next(iter(calls))).timings
    for session in sessions.values():
        session.close()
    ms = {name: timing.latency().ms for name, timing in found.items()}
    return [{"stitch": name, "ms": ms[name], "default_ms": ms[other]} for name, other in pairs.items()]


def summary(rows: list[dict[str, Any]], times: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind: networks, their mean gain in accuracy over the default with its standard error, median and extremes."""
    found: dict[str, Any] = {}
    for name in sorted({row["kind"] for row in rows}):
        some = [row for row in rows if row["kind"] == name]
        gain = np.array([row["accuracy"] - row["default"] for row in some])
        spread = float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None
        values = {
            "networks": len(some),
            "left_relative": float(np.exp(np.mean(np.log([row["left_relative"] for row in some])))),
            "expected": float(np.mean([row["expected"] for row in some])),
            "gain": float(gain.mean()),
            "standard_error": spread,
            "median": float(np.median(gain)),
            "least": float(gain.min()),
            "largest": float(gain.max()),
            "default": float(np.mean([row["default"] for row in some])),
        }
        found[name] = {key: value if value is None else round(value, 4) for key, value in values.items()}
    ratios = defaultdict[str, list[float]](list)
    for row in times:
        ratios[kind(Form.parse(row["stitch"].partition(":")[2]))].append(row["ms"] / row["default_ms"])
    found["latency"] = {
        name: {"stitches": len(some), "median": round(float(np.median(some)), 3)}
        | {"least": round(min(some), 3), "largest": round(max(some), 3)}
        for name, some in ratios.items()
    }
    return found


def data_of(folder: Path, probe: int) -> Data:
    """Probe and validation images of `x_train` alone."""
    data, rest = cifarzoo.load_data(folder, probe, 1, VALIDATION, 1)
    return replace(data, validation=rest)


@click.command()
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; else the embedded zoo.")
@click.option("--blocks", default=5, show_default=True, help="Blocks that each donor is cut into.")
@click.option("--pairs", "count", default=60, show_default=True, help="Networks of each kind of form.")
@click.option("--probe", default=512, show_default=True, help="Probe images.")
@click.option("--limit-s", default=60.0, show_default=True, help="Seconds for the latencies.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write machine, protocol, rows and figures.")
def main(zoo_dir: Path | None, blocks: int, count: int, probe: int, limit_s: float, output: Path | None) -> None:
    """Print which forms are decided for, and what they give."""
    torch.set_num_threads(1)
    if zoo_dir is None:
        context = open_context(Zoo.load("digits", check=lambda _: None), Data.load("digits", probe=probe))
    else:
        zoo = cifarzoo.load_zoo(zoo_dir / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-")))
        context = open_context(zoo, data_of(zoo_dir / "data", probe))
    world = World.open(context, blocks)
    found = chosen(world)
    click.echo(f"decided: {found}")
    rows = compared(world, count)
    times = timed(world, rows, limit_s)
    figures = {"decided": found, **summary(rows, times)}
    protocol = {"blocks": blocks, "pairs": count, "probe": probe, "validation": len(context.data.validation)}
    give({"machine": machine(), "protocol": protocol, "rows": rows + times, "figures": figures}, output)


if __name__ == "__main__":
    main()
