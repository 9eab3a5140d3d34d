"""What a compile came to: the chosen network, its plan in the IR, and held-out accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from derc import stitching
from derc.artifacts import Assembly, Emitted, LoweredZoo, Shipped
from derc.assembled import assemble, seeded
from derc.config import CompileSettings
from derc.data import Split
from derc.ir import Graph, Op
from derc.judge import columns_of, correct, logits
from derc.pipeline import Context, Timings
from derc.search import Judged, Search
from derc.version import VERSION


@dataclass(frozen=True)
class Outcome:
    """Everything that the final report is made from."""

    settings: CompileSettings
    command: str
    context: Context
    search: Search
    lowered: LoweredZoo
    chosen: Judged
    emitted: Emitted
    shipped: Shipped
    met: bool
    timings: Timings
    negligible: float


def plan_graph(assembly: Assembly, outcome: Outcome) -> Graph:
    """The assembly in the IR: blocks and stitches as operations."""
    donors = outcome.search.cuts.donors
    first = donors[assembly.blocks[0].donor].cuts[0]
    ops: list[Op] = []
    value = first.name
    for index, block in enumerate(assembly.blocks):
        donor = donors[block.donor]
        if index and assembly.stitched[index - 1]:
            before = assembly.blocks[index - 1]
            source, target = donors[before.donor].cuts[before.last].type, donor.cuts[block.first].type
            price = stitching.cost(source, target)
            ops.append(
                Op(
                    f"stitch{index}",
                    "stitch",
                    stitching.key(source, target),
                    (value,),
                    target,
                    price.params,
                    price.macs,
                    price.bytes,
                )
            )
            value = f"stitch{index}"
        units = donor.units[block.first : block.last]
        params, macs = sum(u.params for u in units), sum(u.macs for u in units)
        kind = donor.cuts[block.last].type
        ops.append(Op(f"block{index}", "block", str(block), (value,), kind, params, macs, 4 * kind.numel))
        value = f"block{index}"
    return Graph("assembly", first, tuple(ops), value, {"derc": VERSION})


def accuracies(outcome: Outcome) -> dict[str, Any]:
    """Validation and held-out accuracies of network, random-stitch baseline and donors; None without labels."""
    context, chosen = outcome.context, outcome.chosen
    data, assembly = context.data, chosen.assembly
    network = assemble(assembly, context.lowered, chosen.stitched.states)
    with seeded(context.seed):
        baseline = assemble(assembly, context.lowered)
    last = assembly.blocks[-1].donor
    donors = {name: _both(context.lowered[name].program, name, context) for name in outcome.search.select.heads}
    return {
        "validation": _accuracy(network, last, context, data.validation),
        "heldout": _accuracy(network, last, context, data.heldout),
        "random_stitch_heldout": None if assembly.intact else _accuracy(baseline, last, context, data.heldout),
        "donors": donors,
        "best_intact_within_budget": _best_intact(outcome, donors),
    }


def _both(network: nn.Module, name: str, context: Context) -> dict[str, float | None]:
    data = context.data
    return {split: _accuracy(network, name, context, getattr(data, split)) for split in ("validation", "heldout")}


def _accuracy(network: nn.Module, donor: str, context: Context, split: Split) -> float | None:
    if split.labels is None:
        return None
    right = correct(logits(network, split), split, columns_of(context.zoo[donor].labels, context.data))
    return None if right is None else float(right.mean())


def _best_intact(outcome: Outcome, donors: dict[str, dict[str, float | None]]) -> dict[str, Any] | None:
    """What an assembly has to beat, by its last measurement."""
    best = outcome.search.best_intact()
    if best is None:
        return None
    name = best.assembly.blocks[0].donor
    return {
        "donor": name,
        "heldout": donors[name]["heldout"],
        "measured_ms": best.measured.ms if best.measured else None,
    }
