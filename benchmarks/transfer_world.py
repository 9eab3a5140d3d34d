"""A seed of a transfer task: donors with fitted heads, budgets in multiply-accumulates, and what is compared there.

Latencies are not measured: the table says that a million multiply-accumulates take a millisecond, so that a busy
machine changes nothing. Wherever the accuracy benchmark says ms, that is what it means here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from benchmarks.accuracy_choices import INTACT, kept
from benchmarks.accuracy_networks import Net, stitched_net
from benchmarks.accuracy_rounds import Round
from benchmarks.accuracy_world import NotComputedError, Work, World, analysed, on_one_thread
from benchmarks.contexts import open_context
from benchmarks.transfer_tasks import Task
from derc import layered
from derc.artifacts import DonorHeads, FittedHead, Latency, LatencyTable
from derc.compiler import Analysis
from derc.config import CompileSettings
from derc.donor import Donor
from derc.pipeline import Context, Timings
from derc.transfer import headed, with_heads
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo


def open_world(task: Task, seed: int, folder: Path, *, closed: bool = False) -> World:
    """Fit the heads and analyse the zoo, or take both from the work folder.

    With `closed` nothing is made: NotComputedError is raised where the folder does not have it.
    """
    work, data, timings = Work(folder / str(seed), closed), task.data(seed), Timings()
    if closed and not (work.folder / "artifacts" / "partition.json").is_file():
        raise NotComputedError(f"{task.name}, seed {seed}")
    bare = on_one_thread(open_context(task.zoo, data, seed), LiveDonors(task.zoo, NEGLIGIBLE), work)
    zoo = headed(task.zoo, work.artifact("heads", DonorHeads, lambda: fitted(bare, timings)), data.classes or ())
    live = LiveDonors(zoo, NEGLIGIBLE)
    context = replace(bare, zoo=zoo, lowered=live)
    analysis = analysed(work, context, CompileSettings(seed=seed), timings)
    table = counted(analysis, data.task_donors(zoo))
    budgets = np.quantile([one.ms for one in table.donors.values()], task.quantiles)
    limits = tuple(dict.fromkeys(round(float(budget), 3) for budget in budgets))
    fresh = Zoo("fresh", tuple(without_weights(donor, seed) for donor in zoo.donors))
    return World(work, task.size, task.data, zoo, analysis, table, limits, live, LiveDonors(fresh, NEGLIGIBLE))


def fitted(context: Context, timings: Timings) -> DonorHeads:
    """A head for each donor that can have one, as a compile fits them."""
    (found,) = with_heads([context], "auto", timings)
    return DonorHeads({donor.name: donor.head for donor in found.zoo.donors if donor.head is not None})


def counted(analysis: Analysis, heads: tuple[str, ...]) -> LatencyTable:
    """A table in which a million multiply-accumulates take a ms."""
    graph = layered.build(analysis.cuts, analysis.partition, heads)
    units = {name: donor.units for name, donor in analysis.cuts.donors.items()}
    blocks = {one: sum(unit.macs for unit in units[one.donor][one.first : one.last]) for one in graph.blocks}
    stitches = {
        edge.stitch: edge.macs - blocks[edge.target]
        for edge in graph.edges
        if edge.stitch is not None and edge.target is not None
    }
    return LatencyTable(
        "multiply-accumulates",
        {},
        {name: million(sum(unit.macs for unit in found)) for name, found in units.items()},
        {str(block): million(macs) for block, macs in blocks.items()},
        {key: million(macs) for key, macs in stitches.items()},
        0.0,
    )


def million(macs: int) -> Latency:
    """At least one, for a block without any must have a latency too."""
    ms = max(macs, 1) / 1e6
    return Latency(ms, ms, ms, "predicted")


def without_weights(donor: Donor, seed: int) -> Donor:
    """The architecture alone, with a random head for as many classes."""
    head = None if donor.head is None else random_head(donor.head, seed)
    return replace(donor, weights=None, head=head)


def random_head(head: FittedHead, seed: int) -> FittedHead:
    """A head of the same shape with torch's own distribution of a linear layer's weights."""
    classes, features = head.weight.shape
    bound = features**-0.5
    values = np.random.default_rng(seed).uniform(-bound, bound, (classes, features + 1)).astype(np.float32)
    return replace(head, weight=values[:, :-1].copy(), bias=values[:, -1].copy())


@dataclass(frozen=True)
class TransferRound(Round):
    """As in the accuracy benchmark, but donors are trained from, and teach in, the state in which a compile gives them.

    That is with a fitted head, and with batch norms of the task's images where these are better. `donor3` has as many
    epochs as an assembly at stage 3.
    """

    of_donor: ClassVar[tuple[str, ...]] = ("donor1", "donor_recalibrated", "donor3", "donor4", "distilled")

    def begun(self, donor: str) -> Net:
        return stitched_net(kept(self.world, self.seed, INTACT, self.whole(donor)), self.world.lowered)

    def recalibrated(self, donor: str) -> Net:
        return self.begun(donor)

    def teacher(self, donor: str) -> nn.Module:
        return self.begun(donor).network
