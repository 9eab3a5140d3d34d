"""adding: what each block adds to the objective's score, where that is nearly a sum over blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from derc.artifacts import BlockParts, Partition, digest
from derc.pipeline import Context
from derc.scoring.codes import Naswot, block_kernels, linear_parts


@dataclass(frozen=True)
class AddingParts:
    """NASWOT's first-order parts, from one pass per donor over its images; no parts for any other objective."""

    name: ClassVar[str] = "adding"
    produces: ClassVar[type] = BlockParts

    def inputs(self, context: Context) -> str:
        donors = [donor.digest() for donor in context.zoo.donors]
        return digest(donors, context.data.probe.digest, context.objective)

    def run(self, context: Context, partition: Partition) -> BlockParts:
        if context.objective != Naswot.name:
            return BlockParts({})
        return naswot_parts(context, partition)


def naswot_parts(context: Context, partition: Partition) -> BlockParts:
    """What each block adds to NASWOT's share of the networks of a partition; see `linear_parts`."""
    kernels, blocks = [], [block for chain in partition.blocks.values() for block in chain]
    for name, chain in partition.blocks.items():
        modules = [context.lowered[name].block(block.first, block.last).eval() for block in chain]
        kernels += block_kernels(modules, context.data.probe, Naswot())
    parts = linear_parts(kernels, [block.set for block in blocks], Naswot())
    return BlockParts({str(block.plain): part for block, part in zip(blocks, parts, strict=True)})
