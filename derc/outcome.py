"""What a compile came to: the chosen network, its plan in the IR, and held-out accuracies."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from derc import enginelock
from derc.artifacts import Assembly, BlockRef, CutDonor, Emitted, LoweredZoo, Shipped
from derc.assembled import assemble, live, seeded
from derc.config import CompileSettings
from derc.data import Split
from derc.deployed import differs
from derc.ir import Graph, Op, Value
from derc.judge import columns_of, correct, logits, run_logits
from derc.parts import entry, parts
from derc.pipeline import Context, Timings
from derc.search import Judged, Search
from derc.stitching import StitchCost
from derc.version import VERSION

Network = Callable[[Split], torch.Tensor]
"""Gives (n, classes) outputs for the images of a split."""


@dataclass(frozen=True)
class Outcome:
    """Everything that the final report is made from; `met` is None where the latency was not measured."""

    settings: CompileSettings
    command: str
    context: Context
    search: Search
    lowered: LoweredZoo
    chosen: Judged
    emitted: Emitted
    shipped: Shipped
    met: bool | None
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
    """Validation and held-out accuracies of network, random-stitch baseline and donors; None without labels.

    `of` says what answered for the network: the module, or the engine where its precisions differ from float32.
    """
    context, chosen = outcome.context, outcome.chosen
    assembly, last = chosen.assembly, chosen.assembly.blocks[-1].donor
    with seeded(context.seed):
        baseline = assemble(assembly, context.lowered)
    heads = outcome.search.select.heads
    donors = {name: _both(partial(logits, context.lowered[name].program), name, context) for name in heads}
    with _answering(outcome) as network:
        own = _both(network, last, context)
    return {
        **own,
        "of": "engine" if differs(context, assembly) else "module",
        "random_stitch_heldout": None
        if assembly.plain.intact
        else _accuracy(partial(logits, baseline), last, context, context.data.heldout),
        "donors": donors,
        "best_intact_within_budget": _best_intact(outcome, donors),
    }


@contextmanager
def _answering(outcome: Outcome) -> Iterator[Network]:
    """The network as it is shipped: its module, or its engine where that computes something else."""
    context, stitched = outcome.context, outcome.chosen.stitched
    if not differs(context, stitched.assembly):
        yield partial(logits, live(stitched, context.lowered))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"engine{context.engine.suffix}")
        path.write_bytes(outcome.shipped.engine.tobytes())
        enginelock.place(path).write_text(outcome.shipped.lock, encoding="utf-8")
        session = context.engine.load(path)
        try:
            yield lambda split: run_logits(session, split, context.target.batch)
        finally:
            session.close()


def _both(network: Network, name: str, context: Context) -> dict[str, float | None]:
    data = context.data
    return {split: _accuracy(network, name, context, getattr(data, split)) for split in ("validation", "heldout")}


def _accuracy(network: Network, donor: str, context: Context, split: Split) -> float | None:
    if split.labels is None:
        return None
    right = correct(network(split), split, columns_of(context.zoo[donor].labels, context.data))
    return None if right is None else float(right.mean())


def _best_intact(outcome: Outcome, donors: dict[str, dict[str, float | None]]) -> dict[str, Any] | None:
    """What an assembly has to beat, by its last measurement."""
    best = outcome.search.best_intact()
    if best is None:
        return None
    name = best.assembly.blocks[0].donor
    came = donors[name]["heldout"]
    anew = any(best.stitched.buffers)
    network = partial(logits, live(best.stitched, outcome.context.lowered))
    return {
        "donor": name,
        "heldout": _accuracy(network, name, outcome.context, outcome.context.data.heldout) if anew else came,
        "recalibrated": anew,
        "heldout_as_it_came": came,
        "measured_ms": best.measured.ms if best.measured else None,
    }
