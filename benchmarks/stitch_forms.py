"""What other forms of stitch would give: affine, identity, low rank, and other ways to meet a coarser grid.

    python benchmarks/stitch_forms.py [--zoo-dir DIR] [--pairs 40] [--probe 512] [--json FILE]

For random pairs of cuts of two donors (the embedded zoo, or the CIFAR-10 networks of DIR) every form is fitted in
closed form on three of four batches of probe images, and chosen by the error on the others, as ridge's penalty is. What
the choice is worth is told by other images: the share of variance left there, relative to that of ridge behind a mean.
All forms of the first table are matrices of the full stitch, so that they cost what it costs; the ways to meet a grid
would have prices of their own.
"""

from __future__ import annotations

import platform
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import cifarzoo
from benchmarks.contexts import open_context
from benchmarks.results import give
from derc import stitching
from derc.data import Data
from derc.modules import Stitch
from derc.passes.stitch import HELD_BACK, STRENGTHS, Moments, body_rows
from derc.pipeline import Context
from derc.zoo import Zoo

VALIDATION = 200
Pair = tuple[tuple[str, int], tuple[str, int]]
Form = Callable[[Moments], torch.Tensor]


def affine(sums: Moments) -> torch.Tensor:
    """A scale and a bias for each channel."""
    xx, xy, mean_x, mean_y = sums.centred()
    scale = xy.diagonal() / xx.diagonal().clamp_min(1e-12)
    return torch.cat([torch.diag(scale), (mean_y - mean_x * scale)[None]])


def identity(sums: Moments) -> torch.Tensor:
    width = sums.xy.shape[1]
    return torch.cat([torch.eye(width), torch.zeros(1, width)]).double()


def low_rank(sums: Moments, strength: float, share: int) -> torch.Tensor:
    """Reduced-rank ridge regression (Mukherjee and Zhu 2011): of the smaller width only 1/`share` directions."""
    full, (_, xy, mean_x, mean_y) = sums.solve(strength)[:-1], sums.centred()
    explained = full.T @ xy
    rank = max(1, min(full.shape) // share)
    kept = torch.linalg.eigh((explained + explained.T) / 2)[1][:, -rank:]
    weight = full @ kept @ kept.T
    return torch.cat([weight, (mean_y - mean_x @ weight)[None]])


def forms(same_width: bool) -> Iterator[tuple[str, Form]]:
    """Every candidate with its name; a form with several penalties comes several times."""
    for strength in STRENGTHS:
        yield "ridge", lambda sums, s=strength: sums.solve(s)  # type: ignore[misc]
        for share in (2, 4, 8):
            yield f"rank/{share}", lambda sums, s=strength, r=share: low_rank(sums, s, r)  # type: ignore[misc]
    if same_width:
        yield from (("affine", affine), ("identity", identity))


def regridded(stitch: Stitch, x: torch.Tensor, mode: str) -> torch.Tensor:
    """(N, C, H, W) on the target's grid; all but the mean are for axes that shrink by a whole factor."""
    down = [old // new for old, new in zip(stitch.before, stitch.after, strict=True)]
    match mode:
        case "strided":
            return x[:, :, :: down[0], :: down[1]]
        case "bilinear":
            return F.interpolate(x, size=stitch.after, mode="bilinear", align_corners=False)
        case "largest":
            return F.max_pool2d(x, down)
        case _:
            return stitch.enlarge(stitch.shrink(x))


@torch.no_grad()
def sums_of(context: Context, pair: Pair, mode: str = "mean") -> tuple[Moments, Moments, Moments]:
    """Of the batches that are fitted to, of those held back, and of other images."""
    source, target = (context.lowered[name].cuts[cut].type for name, cut in pair)
    stitch = stitching.build(source, target)
    front, donor = (context.lowered[name].block(0, cut).eval() for name, cut in pair)
    found: list[Moments] = []
    for number, split in enumerate((context.data.probe, context.data.validation.first(VALIDATION))):
        for place, (images, _) in enumerate(split.batches(max(1, min(32, len(split) // HELD_BACK)))):
            given, wanted = front(images.clone()), donor(images.clone())
            rows, targets = body_rows(stitch, given, wanted)
            if mode != "mean":
                rows = regridded(stitch, stitch.split(given)[0], mode).permute(0, 2, 3, 1).flatten(0, 2)
            found = found or [Moments(rows.shape[1], targets.shape[1]) for _ in range(3)]
            found[2 if number else place % HELD_BACK == HELD_BACK - 1].add(rows, targets)
    return found[0], found[1], found[2]


def pairs(context: Context, count: int, *, coarser: bool) -> list[Pair]:
    """Random pairs of cuts that a stitch joins; `coarser`: whose grid shrinks by a whole factor."""
    chosen, seeded = list[Pair](), random.Random(0)
    while len(chosen) < count:
        one, other = (
            (name, seeded.randrange(1, len(context.lowered[name].units)))
            for name in seeded.sample(context.zoo.names, 2)
        )
        source, target = (context.lowered[name].cuts[cut].type for name, cut in (one, other))
        if not stitching.keeps_places(source, target):
            continue
        grids = source.spatial or (), target.spatial or ()
        whole = len(grids[0]) == len(grids[1]) == 2 and all(a % b == 0 for a, b in zip(*grids, strict=True))
        if not coarser or (whole and grids[0] != grids[1]):
            chosen.append((one, other))
    return chosen


def compare_forms(context: Context, chosen: list[Pair]) -> list[dict[str, float | str]]:
    """For each pair the form that is chosen, and what is left on other images relative to ridge."""
    rows: list[dict[str, float | str]] = []
    for pair in chosen:
        fit, held, other = sums_of(context, pair)
        tried = [(held.unexplained(form(fit)), name, form) for name, form in forms(len(fit.xx) - 1 == fit.xy.shape[1])]
        best, ridge = min(tried, key=lambda t: t[0]), min((t for t in tried if t[1] == "ridge"), key=lambda t: t[0])
        left = [other.unexplained(one[2](fit + held)) for one in (best, ridge)]
        rows.append({"chosen": best[1], "left": left[0], "relative": left[0] / left[1]})
    return rows


def compare_grids(context: Context, chosen: list[Pair], modes: tuple[str, ...]) -> list[dict[str, float | str]]:
    """For each pair the way to meet the target's grid that is chosen, and what is left relative to the mean."""
    rows: list[dict[str, float | str]] = []
    for pair in chosen:
        found: dict[str, tuple[float, float]] = {}
        for mode in modes:
            fit, held, other = sums_of(context, pair, mode)
            error, strength = min((held.unexplained(fit.solve(strength)), strength) for strength in STRENGTHS)
            found[mode] = error, other.unexplained((fit + held).solve(strength))
        best = min(modes, key=lambda mode: found[mode][0] - 1e-9 * (mode == "mean"))
        rows.append({"chosen": best, "left": found[best][1], "relative": found[best][1] / found["mean"][1]})
    return rows


def summary(rows: list[dict[str, float | str]]) -> dict[str, Any]:
    """How often each was chosen; the geometric mean, least and largest of what is left, relative to what derc does."""
    relative = np.array([float(row["relative"]) for row in rows])
    chosen = dict(Counter(str(row["chosen"]) for row in rows).most_common())
    mean = round(float(np.exp(np.log(relative).mean())), 4)
    return {
        "chosen": chosen,
        "mean": mean,
        "least": round(float(relative.min()), 4),
        "largest": round(float(relative.max()), 4),
    }


@click.command()
@click.option("--zoo-dir", type=click.Path(path_type=Path), help="Folder with zoo/ and data/; else the embedded zoo.")
@click.option("--pairs", "count", default=40, show_default=True, help="Pairs of cuts.")
@click.option("--probe", default=512, show_default=True, help="Probe images.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write machine, protocol, rows and figures.")
def main(zoo_dir: Path | None, count: int, probe: int, output: Path | None) -> None:
    """Print what the choice of a form, and of a way to meet a grid, would be worth."""
    torch.set_num_threads(1)
    if zoo_dir is None:
        context = open_context(Zoo.load("digits", check=lambda _: None), Data.load("digits", probe=probe))
    else:
        data, _ = cifarzoo.load_data(zoo_dir / "data", probe, VALIDATION, 1, 1)
        zoo = cifarzoo.load_zoo(zoo_dir / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-")))
        context = open_context(zoo, data)
    coarser = pairs(context, count, coarser=True)
    rows = {
        "form": compare_forms(context, pairs(context, count, coarser=False)),
        "grid": compare_grids(context, coarser, ("mean", "strided", "bilinear")),
        "grid, largest too": compare_grids(context, coarser, ("mean", "strided", "bilinear", "largest")),
    }
    figures = {name: summary(part) for name, part in rows.items()}
    for name, figure in figures.items():
        click.echo(f"{name}: {figure}")
    give({"machine": platform.platform(), "protocol": __doc__, "rows": rows, "figures": figures}, output)


if __name__ == "__main__":
    main()
