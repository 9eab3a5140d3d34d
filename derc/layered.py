"""The layered graph of blocks and stitches: every path from the input to the output is an assembly."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from derc import stitching
from derc.artifacts import Array, Assembly, BlockRef, CutZoo, Partition
from derc.engine import PRECISIONS
from derc.errors import DercError
from derc.ir import TensorType

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Of one weight where a block's are not known as a whole; the few that stay wider (biases, norms) count as others."""


@dataclass(frozen=True)
class Edge:
    """A step from `source` (None: the network's input) to `target` (None: its output), with the costs of taking it.

    `params`, `macs`, `weights` (bytes of the parameters in their precision) and `activation` (largest value in float32,
    bytes, one image) are those of the stitch and of the target block. `stitch` is the stitch's key in a latency table,
    None where none is needed.
    """

    source: BlockRef | None
    target: BlockRef | None
    params: int = 0
    macs: int = 0
    weights: int = 0
    activation: int = 0
    stitch: str | None = None

    @property
    def skipped(self) -> int:
        """Number of equivalence sets that the step leaves out."""
        if self.source is None or self.target is None:
            return 0
        return self.target.set - self.source.set - 1

    def __str__(self) -> str:
        return f"{self.source or 'input'} > {self.target or 'output'}"


@dataclass(frozen=True)
class Layered:
    """`blocks` in donor order, `sets` their number per donor; `edges` lead from earlier to later equivalence sets.

    A block is here once for each precision that it may have.
    """

    blocks: tuple[BlockRef, ...]
    edges: tuple[Edge, ...]
    sets: int

    @cached_property
    def places(self) -> dict[tuple[BlockRef | None, BlockRef | None], int]:
        return {(edge.source, edge.target): place for place, edge in enumerate(self.edges)}

    @cached_property
    def chains(self) -> dict[str, tuple[BlockRef, ...]]:
        """Each donor's own blocks in float32, in order."""
        plain = [block for block in self.blocks if block.plain is block]
        names = dict.fromkeys(block.donor for block in plain)
        return {name: tuple(block for block in plain if block.donor == name) for name in names}

    @cached_property
    def entering(self) -> dict[BlockRef | None, tuple[int, ...]]:
        """The edges into each block, and into the output."""
        return self._group([edge.target for edge in self.edges])

    @cached_property
    def leaving(self) -> dict[BlockRef | None, tuple[int, ...]]:
        """The edges out of each block, and out of the input."""
        return self._group([edge.source for edge in self.edges])

    def _group(self, ends: list[BlockRef | None]) -> dict[BlockRef | None, tuple[int, ...]]:
        grouped: dict[BlockRef | None, list[int]] = {block: [] for block in (None, *self.blocks)}
        for place, end in enumerate(ends):
            grouped[end].append(place)
        return {end: tuple(places) for end, places in grouped.items()}

    def path(self, assembly: Assembly) -> tuple[int, ...] | None:
        """The edges of an assembly, from input to output; None where it is not a path of this graph."""
        stops = (None, *assembly.blocks, None)
        steps = [self.places.get(step) for step in pairwise(stops)]
        return None if None in steps else tuple(place for place in steps if place is not None)

    def assembly(self, chosen: Iterable[int]) -> Assembly:
        """The assembly of the path that the chosen edges form."""
        after = {self.edges[place].source: self.edges[place].target for place in chosen}
        blocks, stop = list[BlockRef](), after[None]
        while stop is not None:
            blocks.append(stop)
            stop = after[stop]
        return Assembly(tuple(blocks))

    def costs(self, path: tuple[int, ...]) -> dict[str, float]:
        """`params`, `macs` and `memory_mb` (10⁶ bytes: all weights and the largest activation) of a path."""
        edges = [self.edges[place] for place in path]
        params = sum(edge.params for edge in edges)
        peak = max(edge.activation for edge in edges)
        return {
            "params": float(params),
            "macs": float(sum(edge.macs for edge in edges)),
            "memory_mb": (sum(edge.weights for edge in edges) + peak) / 1e6,
        }

    def column(self, name: str) -> Array:
        """`params`, `macs`, `weights` or `activation` of all edges."""
        return np.array([getattr(edge, name) for edge in self.edges], np.float64)


def build(
    cuts: CutZoo,
    partition: Partition,
    heads: tuple[str, ...] = (),
    *,
    one_per_set: bool = False,
    timed: Collection[str] | None = None,
    weights: Mapping[str, int] | None = None,
) -> Layered:
    """The graph of all legal assemblies; only donors in `heads` (none given: all) may provide the last block.

    Blocks come in the precisions in which `timed` names them (`str(BlockRef)`; None: all blocks in float32), `weights`
    are the known bytes of their weights. A stitch leads from a block to any block of a later set, of the next set only
    with `one_per_set`, whose input it can make without making up places. A donor's own next block follows without one.
    Raises DercError where `timed` names no block of this partition.
    """
    blocks = tuple(_variants(partition, timed))
    if not blocks:
        raise DercError("the latency table has no block of this partition: profile the zoo again")
    sets = max(len(chain) for chain in partition.blocks.values())
    known = weights or {}
    edges = [_edge(cuts, None, block, known) for block in blocks if block.set == 0]
    for source in blocks:
        edges += _onward(cuts, source, [b for b in blocks if b.set == source.set + 1 or not one_per_set], known)
    last = [block for block in blocks if block.set == sets - 1 and (not heads or block.donor in heads)]
    return Layered(blocks, tuple(edges) + tuple(Edge(block, None) for block in last), sets)


def _variants(partition: Partition, timed: Collection[str] | None) -> Iterator[BlockRef]:
    for chain in partition.blocks.values():
        for block in chain:
            forms = [replace(block, precision=precision) for precision in PRECISIONS]
            yield from [block] if timed is None else [form for form in forms if str(form) in timed]


def _onward(cuts: CutZoo, source: BlockRef, targets: list[BlockRef], known: Mapping[str, int]) -> Iterator[Edge]:
    for target in targets:
        joined = target.donor == source.donor and target.first == source.last
        if target.set > source.set and (joined or stitching.keeps_places(*_ends(cuts, source, target))):
            yield _edge(cuts, source, target, known)


def _ends(cuts: CutZoo, source: BlockRef, target: BlockRef) -> tuple[TensorType, TensorType]:
    """Types of what `source` gives and `target` takes."""
    return cuts.donors[source.donor].cuts[source.last].type, cuts.donors[target.donor].cuts[target.first].type


def _edge(cuts: CutZoo, source: BlockRef | None, target: BlockRef, known: Mapping[str, int]) -> Edge:
    units = cuts.donors[target.donor].units[target.first : target.last]
    params, macs = sum(unit.params for unit in units), sum(unit.macs for unit in units)
    weights, peak = known.get(str(target), BYTES[target.precision] * params), max(unit.bytes for unit in units)
    if source is None or (source.donor == target.donor and source.last == target.first):
        return Edge(source, target, params, macs, weights, peak)
    ends = _ends(cuts, source, target)
    stitch = stitching.cost(*ends)
    return Edge(
        source,
        target,
        params + stitch.params,
        macs + stitch.macs,
        weights + BYTES["fp32"] * stitch.params,
        max(peak, stitch.bytes),
        stitching.key(*ends),
    )
