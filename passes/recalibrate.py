"""recalibrate: estimate batch norms anew, on what really reaches them, where answers get better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from derc import fronts
from derc.artifacts import BlockRef, Consensus, StitchedAssembly, digest
from derc.assembled import live
from derc.batchnorm import reestimated
from derc.fronts import Step
from derc.parts import parts
from derc.pipeline import Context
from derc.scoring.evidence import Evidence, gather

VALIDATION = 64
"""Images of a batch."""


@dataclass(frozen=True)
class Recalibrate:
    """New running means and variances, from the probe images, in all blocks behind an assembly's first stitch.

    Of an assembly without stitches, a donor that sees other images than it was trained on, all blocks get them.

    A stitch gives values of other means and variances than the donor's own, of smaller ones above all, since regression
    shrinks; for that reason REPAIR (Jordan et al. 2023, arXiv 2211.08403) rescales the neurons of merged networks. They
    stay only where more validation images are answered right (as the consensus says, without labels), in float32. An
    assembly without batch norms there is as it was, and any assembly where the probes are fewer than `least`. Images go
    through in batches of `batch`, from 128 probes on those of the stitches' fit, so that the fronts are known then.
    """

    batch: int = 32
    least: int = 64
    name: ClassVar[str] = "recalibrate"
    produces: ClassVar[type] = StitchedAssembly

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.digest())

    def run(self, context: Context, stitched: StitchedAssembly, reference: Consensus) -> StitchedAssembly:
        probe, blocks = context.data.probe, stitched.assembly.blocks
        every, network = parts(stitched.assembly, context.lowered), live(stitched, context.lowered)
        chosen = [isinstance(part.spec, BlockRef) for part in every]
        if len(probe) < self.least:
            return stitched
        first = 0 if all(chosen) else chosen.index(False)
        front = [fronts.block(context.lowered[block.donor], block) for block in blocks[:first]]
        inputs = (x for x in context.fronts.run(probe, self.batch, front) if len(x) > 1)
        found = reestimated(list(network.parts)[first:], inputs, chosen[first:])
        behind = [one for one, block in zip(found, chosen[first:], strict=True) if block]
        if not any(behind):
            return stitched
        other = replace(stitched, buffers=(*({} for _ in front), *behind))
        tails = network.parts[first:], live(other, context.lowered).parts[first:]
        labels = context.zoo[blocks[-1].donor].labels
        before, after = _right(context, gather(context.data, labels, reference), front, tails)
        return other if after > before else stitched


@torch.no_grad()
def _right(
    context: Context, asked: Evidence, front: Sequence[Step], tails: Sequence[Iterable[nn.Module]]
) -> tuple[int, ...]:
    """How many validation images each tail answers right behind the common front."""
    right = [0] * len(tails)
    answers = np.array_split(asked.validation_answers, range(VALIDATION, len(asked.validation_answers), VALIDATION))
    for x, want in zip(context.fronts.run(asked.validation, VALIDATION, front), answers, strict=True):
        for number, tail in enumerate(tails):
            outputs = x
            for module in tail:
                outputs = module(outputs.clone())
            right[number] += int((asked.picked(outputs).argmax(1).numpy() == want).sum())
    return tuple(right)
