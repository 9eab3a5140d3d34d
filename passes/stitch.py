"""stitch: fit the adapters of an assembly in closed form on probe activations (streaming ridge regression)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from derc import fronts
from derc.artifacts import Array, Assembly, StitchedAssembly, digest
from derc.assembled import new_stitch, with_buffers
from derc.batchnorm import reestimated
from derc.data import Split
from derc.fitting import HELD_BACK, NAMES, fit
from derc.fronts import Step
from derc.modules import Stitch
from derc.pipeline import Context


@dataclass(frozen=True)
class FitStitches:
    """Fits an assembly's stitches in order, each on what the network before it really gives.

    With `norms`, the batch norms of all blocks behind the first stitch have statistics that are estimated anew on what
    the stitches give, and each stitch is fitted on what the blocks before it give with these; not from fewer than
    `least` images. Images go through in batches of at most `batch`.
    """

    batch: int = 32
    norms: bool = False
    least: int = 64
    name: ClassVar[str] = "stitch"
    produces: ClassVar[type] = StitchedAssembly

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.probe.digest)

    def run(self, context: Context, assembly: Assembly) -> StitchedAssembly:
        states: list[dict[str, Array]] = []
        residual: list[float] = []
        buffers: list[dict[str, Array]] = []
        front: list[Step] = []
        run = partial(context.fronts.run, context.data.probe, self._size(context.data.probe))
        for first, last in pieces(assembly):
            block, lowered = assembly.blocks[first], context.lowered[assembly.blocks[first].donor]
            if first:
                stitch = new_stitch(assembly, first, context.lowered)
                donor = fronts.block(lowered, replace(block, first=0, last=block.first))
                names = f"donor {assembly.blocks[first - 1].donor}", f"donor {block.donor}"
                residual.append(fit(stitch, run(front), run([donor]), names))
                states.append({name: value.detach().numpy().copy() for name, value in stitch.state_dict().items()})
                front.append(fronts.added(stitch))
            steps = [fronts.block(context.lowered[b.donor], b) for b in assembly.blocks[first:last]]
            found = self._anew(context, steps, run(front)) if first else ({},) * len(steps)
            front.extend(_with(step, one) for step, one in zip(steps, found, strict=True))
            buffers.extend(found)
        return StitchedAssembly(assembly, tuple(states), tuple(residual), None, tuple(buffers) if any(buffers) else ())

    def _anew(
        self, context: Context, steps: list[Step], inputs: Iterable[torch.Tensor]
    ) -> tuple[dict[str, Array], ...]:
        """What takes the place of these blocks' statistics; nothing where the probes are too few."""
        if not self.norms or len(context.data.probe) < self.least:
            return ({},) * len(steps)
        enough = (x for x in inputs if len(x) > 1)
        return reestimated([step.module for step in steps], enough, [True] * len(steps))

    def fit(
        self, stitch: Stitch, front: nn.Module, donor: nn.Module, probe: Split, names: tuple[str, str] = NAMES
    ) -> float:
        """Set `stitch` so that stitch(front(x)) ≈ donor(x) on the probe images; see `derc.fitting.fit`."""
        sources = (front(images.clone()) for images, _ in probe.batches(self._size(probe)))
        targets = (donor(images.clone()) for images, _ in probe.batches(self._size(probe)))
        return fit(stitch, sources, targets, names)

    def _size(self, probe: Split) -> int:
        return max(1, min(self.batch, len(probe) // HELD_BACK))


def _with(step: Step, buffers: dict[str, Array]) -> Step:
    return fronts.added(with_buffers(step.module, buffers)) if buffers else step


def pieces(assembly: Assembly) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of the blocks between stitches."""
    begins = [0, *(place for place, stitched in enumerate(assembly.stitched, 1) if stitched), len(assembly.blocks)]
    yield from itertools.pairwise(begins)
