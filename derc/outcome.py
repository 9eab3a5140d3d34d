"""What a compile came to: the chosen network, its plan in the IR, and held-out accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from derc.artifacts import Assembly, BlockRef, CutDonor, Emitted, LoweredZoo, Shipped
from derc.assembled import assemble, seeded
from derc.config import CompileSettings
from derc.data import Split
from derc.ir import Graph, Op, Value
from derc.judge import columns_of, correct, logits
from derc.parts import entry, parts
from derc.pipeline import Context, Timings
from derc.search import Judged, Search
from derc.stitching import StitchCost
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


def plan_graph(assembly: Assembly, donors: Mapping[str, CutDonor]) -> Graph:
    """The assembly in the IR: blocks, stitches, stem and head as operations."""
    first = Value(donors[assembly.blocks[0].donor].cuts[0].name, entry(assembly, donors))
    ops: list[Op] = []
    for part in parts(assembly, donors):
        operand = ops[-1].name if ops else first.name
        if isinstance(part.spec, BlockRef):
            units = donors[part.spec.donor].units[part.spec.first : part.spec.last]
            cost = StitchCost(sum(u.params for u in units), sum(u.macs for u in units), 4 * part.target.numel)
        else:
            cost = part.cost
        label, kind = part.label, part.kind
        ops.append(Op(part.name, kind, label, (operand,), part.target, cost.params, cost.macs, cost.bytes))
    return Graph("assembly", first, tuple(ops), ops[-1].name, {"derc": VERSION})


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
