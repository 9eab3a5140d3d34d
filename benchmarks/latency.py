"""Latency tables: how near the prediction of a whole network from its parts comes, what a table costs, how it repeats.

    python benchmarks/latency.py [--quick] [--engines onnxruntime,openvino,inductor] [--once] [--json result.json]

Networks of several families at 224 × 224, batch 1, random weights, cut into four blocks of about equal MACs, go through
the profile pass as they are. Two protocols, both on networks that the fit has not seen, measured in the same rounds:
(a) intact networks, each predicted by a fit to the assemblies and to the other intact networks; (b) 40 random
assemblies of the mixed zoo, predicted by a fit to 24 others and to the intact networks. Beside them stands the plain
sum of the blocks and stitches measured alone. Then the same table is measured again (do the intervals agree?), and on
the embedded zoo the cost of a table by donors, blocks and what was known before.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.results import give, machine
from derc import layered, registry
from derc.artifacts import Assembly, BlockRef, CutZoo, Latency, LatencyTable, Partition
from derc.console import Console
from derc.data import Data
from derc.donor import Donor
from derc.errors import MissingDependencyError
from derc.layered import Layered
from derc.milp import choose
from derc.passes.profile import Profile
from derc.pipeline import Context
from derc.prediction import parts_of, predict, wholes
from derc.store import Store
from derc.target import Target
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo

NETWORKS = (
    "resnet50",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "regnety_008",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
QUICK = ("mobilenetv3_large_100", "efficientnet_b0", "regnety_008", "convnext_atto", "vit_tiny_patch16_224")
ENGINES, QUICK_ENGINES = "onnxruntime,openvino,inductor", "onnxruntime,openvino"
FITTED, UNSEEN = 24, 40
NEAR = 0.1


@dataclass(frozen=True)
class World:
    """A zoo on an engine, cut into blocks."""

    context: Context
    cuts: CutZoo
    partition: Partition

    @property
    def graph(self) -> Layered:
        return layered.build(self.cuts, self.partition)


def open_world(zoo: Zoo, engine: str, folder: Path, blocks: int = 4) -> World:
    """The zoo on one of this machine's engines, its store new in `folder`."""
    target = replace(Target.load("cpu"), engine=engine)
    store, console = Store(folder), Console(quiet=True)
    lowered, data = LiveDonors(zoo, NEGLIGIBLE), Data.load("digits", probe=8)
    context = Context(zoo, data, target, store, registry.open_engine(engine), choose("highs"), lowered, console)
    cuts = CutZoo({name: lowered[name].donor for name in zoo.names})
    return World(context, cuts, Partition({n: even(n, cuts, blocks) for n in zoo.names}, 0.0, None, {}))


def even(name: str, cuts: CutZoo, blocks: int) -> tuple[BlockRef, ...]:
    """A donor in blocks of about equal MACs, each of at least one unit."""
    units = cuts.donors[name].units
    done = np.cumsum([unit.macs for unit in units]) / sum(unit.macs for unit in units)
    stops = [0]
    for block in range(1, blocks):
        near = int(np.abs(done - block / blocks).argmin()) + 1
        stops.append(min(max(near, stops[-1] + 1), len(units) - blocks + block))
    stops.append(len(units))
    return tuple(BlockRef(name, a, b, k) for k, (a, b) in enumerate(pairwise(stops)))


def untrained(names: tuple[str, ...]) -> Zoo:
    """timm's networks under a fixed seed."""
    donors = [Donor(name, f"timm:{name}", input_size=(3, 224, 224)) for name in names]
    return Zoo("benchmark", tuple(donors))


def judge(world: World, table: LatencyTable, fitted: int) -> list[dict[str, Any]]:
    """Each network measured whole, predicted by a fit that has not seen it, beside the plain sum of its parts."""
    graph, known = world.graph, {a: latency.ms for a, latency in wholes(table, world.graph).items()}
    own = parts_of(graph, world.cuts, table).own
    intact = {a: ms for a, ms in known.items() if a.intact}
    seen = dict([(a, ms) for a, ms in known.items() if not a.intact][:fitted])
    assemblies = predict(graph, world.cuts, table, intact | seen).latency_ms
    rows = []
    for assembly, ms in known.items():
        path = list(graph.path(assembly) or ())
        if assembly in seen:
            continue
        others = {a: value for a, value in intact.items() if a != assembly}
        edges = predict(graph, world.cuts, table, others | seen).latency_ms if assembly.intact else assemblies
        rows.append(_row(assembly, ms, float(edges[path].sum()), float(own[path].sum())))
    return rows


def _row(assembly: Assembly, ms: float, predicted: float, naive: float) -> dict[str, Any]:
    return {
        "protocol": "intact" if assembly.intact else "assembly",
        "network": assembly.blocks[0].donor if assembly.intact else str(assembly),
        "measured_ms": round(ms, 4),
        "predicted_ms": round(predicted, 4),
        "sum_ms": round(naive, 4),
        "error": round(predicted / ms - 1, 4),
        "sum_error": round(naive / ms - 1, 4),
    }


def errors(rows: list[dict[str, Any]], protocol: str = "", key: str = "error") -> dict[str, float]:
    """Median and quantiles of the absolute errors of one protocol (none named: both), and the share within 10%."""
    found = np.abs([row[key] for row in rows if protocol in ("", row["protocol"])])
    quantiles = {f"q{q}": float(np.quantile(found, q / 100)) for q in (50, 90, 95)}
    return {**quantiles, "max": float(found.max()), "within_10pct": float((found <= NEAR).mean())}


def run_engine(
    engine: str, names: tuple[str, ...], fitted: int, unseen: int
) -> tuple[World, LatencyTable, dict[str, Any]]:
    """One table of the zoo on one engine, with its cost, from an empty store."""
    world = open_world(untrained(names), engine, Path(tempfile.mkdtemp(prefix="derc-latency-")))
    table, wall = measured(world, Profile(networks=fitted + unseen))
    rows = judge(world, table, fitted)
    summary = {
        "engine": engine,
        "wall_s": wall,
        "timed_s": table.timed_s,
        "profile_overhead": wall / table.timed_s,
        "noise_floor": table.noise,
        "entries": len(table.samples),
        "failed": dict(table.failed),
        "unstable": sum(not latency.stable for latency in entries(table).values()),
        "versions": table.engine,
        **{p: {"fit": errors(rows, p), "sum": errors(rows, p, "sum_error")} for p in ("intact", "assembly")},
        "both": {"fit": errors(rows), "sum": errors(rows, key="sum_error")},
        "rows": rows,
    }
    return world, table, summary


def measured(world: World, profile: Profile) -> tuple[LatencyTable, float]:
    """A table and the seconds that it took."""
    start = time.perf_counter()
    table = profile.run(world.context, world.cuts, world.partition)
    return table, time.perf_counter() - start


def entries(table: LatencyTable) -> dict[str, Latency]:
    """Everything that the table measured."""
    named = {f"donor {n}": ms for n, ms in table.donors.items()} | {f"block {n}": ms for n, ms in table.blocks.items()}
    named |= {f"stitch {n}": ms for n, ms in table.stitches.items() if ms.provenance == "measured"}
    return named | {f"network {one.assembly}": one.latency for one in table.networks if one.latency}


def agreement(one: LatencyTable, two: LatencyTable) -> dict[str, float]:
    """Share of entries whose intervals meet, as they are and with the second table brought to the first one's speed."""
    first, second = entries(one), entries(two)
    shared = [(first[name], second[name]) for name in first.keys() & second.keys()]
    speed = float(np.median([b.ms / a.ms for a, b in shared]))
    meet = [a.low_ms <= b.high_ms and b.low_ms <= a.high_ms for a, b in shared]
    level = [a.low_ms <= b.high_ms / speed and b.low_ms / speed <= a.high_ms for a, b in shared]
    apart = [abs(b.ms / speed / a.ms - 1) for a, b in shared]
    return {
        "entries": len(shared),
        "agreement": float(np.mean(meet)),
        "agreement_at_one_speed": float(np.mean(level)),
        "speed_ratio": speed,
        "median_difference": float(np.median(apart)),
    }


def growth() -> list[dict[str, Any]]:
    """Cost of a table of the embedded zoo by donors and blocks, and of a second zoo that shares half of its donors.

    Measuring itself is bounded to 15 s, so that what grows is exporting and building.
    """
    every, found = Zoo.load("digits"), []

    def cost(what: str, donors: int, blocks: int, folder: Path) -> None:
        zoo = replace(every, donors=every.donors[:donors])
        world = open_world(zoo, "onnxruntime", folder, blocks)
        table, wall = measured(world, Profile(limit_s=15.0))
        row = {"what": what, "donors": donors, "blocks": blocks, "entries": len(table.samples)}
        found.append(row | {"wall_s": round(wall, 1), "timed_s": round(table.timed_s, 1)})

    fresh = [Path(tempfile.mkdtemp(prefix="derc-latency-")) for _ in range(5)]
    cost("new store", 2, 4, fresh[0])
    cost("new store", 4, 4, fresh[1])
    cost("new store", 8, 4, fresh[2])
    cost("new store", 8, 2, fresh[3])
    cost("new store", 8, 8, fresh[4])
    cost("4 donors known", 8, 4, fresh[1])
    return found


def figures(summaries: list[dict[str, Any]], again: dict[str, float]) -> dict[str, float]:
    """The worst engine's, over all networks of both protocols, and each engine's by protocol."""
    found: dict[str, float] = {}
    for one in summaries:
        for protocol in ("intact", "assembly"):
            fit, plain = one[protocol]["fit"], one[protocol]["sum"]
            name = f"{one['engine']}_{protocol}"
            found |= {f"{name}_median_abs_error": fit["q50"], f"{name}_within_10pct": fit["within_10pct"]}
            found |= {
                f"{name}_naive_median_abs_error": plain["q50"],
                f"{name}_naive_within_10pct": plain["within_10pct"],
            }
        found[f"{one['engine']}_profile_overhead"] = one["profile_overhead"]
        found[f"{one['engine']}_noise_floor"] = one["noise_floor"]

    def each(form: str, name: str) -> list[float]:
        return [one["both"][form][name] for one in summaries]

    return {
        "median_abs_error": max(each("fit", "q50")),
        "within_10pct": min(each("fit", "within_10pct")),
        "naive_median_abs_error": max(each("sum", "q50")),
        "naive_within_10pct": min(each("sum", "within_10pct")),
        "profile_overhead": max(one["profile_overhead"] for one in summaries),
        "noise_floor": max(one["noise_floor"] for one in summaries),
        **{name: value for name, value in again.items() if name != "entries"},
        **found,
    }


def text(summaries: list[dict[str, Any]]) -> str:
    """Errors by engine and protocol as a Markdown table."""
    names = (
        "engine",
        "protocol",
        "networks",
        "median",
        "90%",
        "95%",
        "largest",
        "within 10%",
        "sum: median",
        "sum: within 10%",
    )
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for one in summaries:
        for protocol in ("intact", "assembly"):
            fit, plain = one[protocol]["fit"], one[protocol]["sum"]
            count = sum(row["protocol"] == protocol for row in one["rows"])
            shares = [
                fit["q50"],
                fit["q90"],
                fit["q95"],
                fit["max"],
                fit["within_10pct"],
                plain["q50"],
                plain["within_10pct"],
            ]
            lines.append(f"| {one['engine']} | {protocol} | {count} | " + " | ".join(f"{x:.1%}" for x in shares) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="Five networks, 12 + 12 assemblies, no growth.")
@click.option("--engines", help=f"Default: {ENGINES}; with --quick {QUICK_ENGINES}.")
@click.option("--once", is_flag=True, help="Do not measure the first engine's table again, nor the growth.")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(quick: bool, engines: str | None, once: bool, output: Path | None) -> None:
    """Measure, predict, compare; print a table, and write everything as JSON."""
    names, fitted, unseen = (QUICK, 12, 12) if quick else (NETWORKS, FITTED, UNSEEN)
    chosen = (engines or (QUICK_ENGINES if quick else ENGINES)).split(",")
    summaries, left_out, repeated = [], {}, {}
    for engine in chosen:
        try:
            world, table, summary = run_engine(engine, names, fitted, unseen)
        except MissingDependencyError as error:
            left_out[engine] = str(error)
            continue
        summaries.append(summary)
        click.echo(
            text([summary]) + f"\nprofile {summary['wall_s']:.0f} s, {summary['profile_overhead']:.2f} of its runs"
        )
        if engine == chosen[0] and not once:
            fresh = replace(world.context, store=Store(Path(tempfile.mkdtemp(prefix="derc-latency-"))))
            repeated = agreement(table, measured(replace(world, context=fresh), Profile(networks=fitted + unseen))[0])
    grown = [] if quick or once else growth()
    result = {
        "machine": machine(),
        "protocol": {"networks": names, "fitted": fitted, "unseen": unseen, "quick": quick, "left_out": left_out},
        "rows": summaries,
        "growth": grown,
        "figures": {name: round(value, 4) for name, value in figures(summaries, repeated).items()},
    }
    click.echo("\n" + text(summaries) + "\n" + "\n".join(f"{row}" for row in grown))
    give(result, output)


if __name__ == "__main__":
    main()
