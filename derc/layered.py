"""The layered graph of blocks and stitches: every path from the input to the output is an assembly."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from derc.artifacts import DEFAULT, Array, Assembly, BlockRef, CutZoo, Joint, Partition
from derc.engine import PRECISIONS
from derc.errors import DercError
from derc.joints import Ends
from derc.stitching import PLAIN, parted

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Of one weight where a block's are not known as a whole; the few that stay wider (biases, norms) count as others."""


@dataclass(frozen=True)
class Edge:
    """A step from `source` (None: the network's input) to `target` (None: its output), with the costs of taking it.

    `params`, `macs`, `weights` (bytes of the parameters in their precision) and `activation` (largest value in float32,
    bytes, one image) are those of the stitch and of the target block. `stitch` is the stitch's key in a latency table,
    None where none is needed. `skipped` counts the equivalence sets that the step leaves out, in parts where blocks may
    begin anywhere.
    """

    source: BlockRef | None
    target: BlockRef | None
    params: int = 0
    macs: int = 0
    weights: int = 0
    activation: int = 0
    stitch: str | None = None
    skipped: float = 0

    def __str__(self) -> str:
        return f"{self.source or 'input'} > {self.target or 'output'}"


@dataclass(frozen=True, eq=False)
class Layered:
    """`blocks` in donor order, `sets` their number per donor; edges lead on through the network.

    Edges from the input come first, then those between blocks, sorted by source, then those to the output. A block is
    here once for each precision that it may have. `tail` and `head` (edges) number the blocks, −1 is the input and
    len(blocks) the output. `depth` (blocks) rises along every edge. `costs_of` has `params`, `macs`, `weights` and
    `activation` (edges); `stitch` (edges) numbers `stitches`, −1: none; `skipped` is as in `Edge`. `whole` are the
    donors' own assemblies where a donor's path is one block, as blocks of any length may be chosen.
    """

    blocks: tuple[BlockRef, ...]
    sets: int
    depth: Array
    tail: Array
    head: Array
    costs_of: Mapping[str, Array]
    stitch: Array
    stitches: tuple[str, ...]
    skipped: Array
    whole: Mapping[str, tuple[BlockRef, ...]] = field(default_factory=dict)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges as objects; large graphs are better read by their columns."""
        ends: list[BlockRef | None] = [*self.blocks, None]
        columns = [self.costs_of[name].tolist() for name in ("params", "macs", "weights", "activation")]
        keys = [self.stitches[number] if number >= 0 else None for number in self.stitch.tolist()]
        steps = zip(self.tail.tolist(), self.head.tolist(), *columns, keys, self.skipped.tolist(), strict=True)
        return tuple(Edge(ends[tail], ends[head], *rest) for tail, head, *rest in steps)

    @property
    def count(self) -> int:
        """Number of edges."""
        return len(self.tail)

    @cached_property
    def number(self) -> dict[BlockRef, int]:
        """The blocks' places in `blocks`."""
        return {block: number for number, block in enumerate(self.blocks)}

    @cached_property
    def plain(self) -> Array:
        """For each block, the number of the first block that is the same one in whatever precision."""
        first: dict[BlockRef, int] = {}
        return np.array([first.setdefault(block.plain, i) for i, block in enumerate(self.blocks)], int)

    @cached_property
    def places(self) -> dict[tuple[BlockRef | None, BlockRef | None], int]:
        return {(edge.source, edge.target): place for place, edge in enumerate(self.edges)}

    @cached_property
    def chains(self) -> dict[str, tuple[BlockRef, ...]]:
        """Each donor's own blocks in float32, in order."""
        if self.whole:
            return dict(self.whole)
        chains: dict[str, list[BlockRef]] = {}
        for block in self.blocks:
            if block.plain is block:
                chains.setdefault(block.donor, []).append(block)
        return {name: tuple(chain) for name, chain in chains.items()}

    @cached_property
    def entering(self) -> dict[BlockRef | None, tuple[int, ...]]:
        """The edges into each block, and into the output."""
        return self._group(self.head)

    @cached_property
    def leaving(self) -> dict[BlockRef | None, tuple[int, ...]]:
        """The edges out of each block, and out of the input."""
        return self._group(self.tail % (len(self.blocks) + 1))

    def _group(self, ends: Array) -> dict[BlockRef | None, tuple[int, ...]]:
        order = np.argsort(ends, kind="stable")
        bounds = np.searchsorted(ends[order], np.arange(len(self.blocks) + 2))
        parts = [tuple(order[a:b].tolist()) for a, b in pairwise(bounds)]
        return {None: parts[-1], **dict(zip(self.blocks, parts, strict=False))}

    @cached_property
    def _first(self) -> Array:
        """Where the edges from each source to blocks begin; the input's are the first."""
        inner = self.tail[self.head < len(self.blocks)]
        return np.searchsorted(inner, np.arange(-1, len(self.blocks) + 1))

    @cached_property
    def _last(self) -> Array:
        """The edge from each block to the output, −1 where there is none."""
        places, ends = np.full(len(self.blocks), -1), np.flatnonzero(self.head == len(self.blocks))
        places[self.tail[ends]] = ends
        return places

    @cached_property
    def joints(self) -> tuple[Joint, ...]:
        """The stitches of `stitches`."""
        return tuple(Joint(form=form) if (form := parted(key)[2]) != PLAIN else DEFAULT for key in self.stitches)

    def _joint(self, place: int) -> Joint | None:
        """The stitch on an edge."""
        number = int(self.stitch[place])
        return self.joints[number] if number >= 0 else None

    def path(self, assembly: Assembly) -> tuple[int, ...] | None:
        """The edges of an assembly, from input to output; None where it is not a path of this graph.

        One whose stitches have other forms is none.
        """
        blocks, joints = _merged(assembly) if self.whole else (assembly.blocks, assembly.joints)
        stops = [self.number.get(block, -1) for block in blocks]
        if not stops or -1 in stops:
            return None
        places, tail = list[int](), -1
        for head in stops:
            low, high = self._first[tail + 1], self._first[tail + 2]
            place = int(low + np.searchsorted(self.head[low:high], head))
            if place == high or self.head[place] != head:
                return None
            places.append(place)
            tail = head
        last = int(self._last[tail])
        alike = self._joints(places) == (joints if any(one not in (None, DEFAULT) for one in joints) else ())
        return (*places, last) if last >= 0 and alike else None

    def _joints(self, places: Sequence[int]) -> tuple[Joint | None, ...]:
        """What an assembly of the edges into its blocks says of its stitches."""
        joints = tuple(self._joint(place) for place in places)
        return joints if any(joint not in (None, DEFAULT) for joint in joints) else ()

    def assembly(self, chosen: Iterable[int]) -> Assembly:
        """The assembly of the path that the chosen edges form."""
        after = {int(self.tail[place]): int(place) for place in chosen}
        places, stop = [after[-1]], int(self.head[after[-1]])
        while stop != len(self.blocks):
            places.append(after[stop])
            stop = int(self.head[after[stop]])
        blocks = [self.blocks[int(self.head[place])] for place in places[:-1]]
        if len(blocks) == 1 and blocks[0].donor in self.whole:
            chain = self.whole[blocks[0].donor]
            return Assembly(tuple(replace(block, precision=blocks[0].precision) for block in chain))
        return Assembly(tuple(blocks), self._joints(places[:-1]))

    def costs(self, path: tuple[int, ...]) -> dict[str, float]:
        """`params`, `macs` and `memory_mb` (10⁶ bytes: all weights and the largest activation) of a path."""
        edges = list(path)
        weights, peak = int(self.costs_of["weights"][edges].sum()), int(self.costs_of["activation"][edges].max())
        return {
            "params": float(self.costs_of["params"][edges].sum()),
            "macs": float(self.costs_of["macs"][edges].sum()),
            "memory_mb": (weights + peak) / 1e6,
        }

    def column(self, name: str) -> Array:
        """`params`, `macs`, `weights` or `activation` of all edges."""
        return self.costs_of[name].astype(np.float64)


def _merged(assembly: Assembly) -> tuple[list[BlockRef], tuple[Joint | None, ...]]:
    """Consecutive blocks of one donor and precision as one block, in the first one's set, and the joints of each."""
    merged, joints = list[BlockRef](), list[Joint | None]()
    for index, block in enumerate(assembly.blocks):
        last, joint = merged[-1] if merged else None, assembly.joint(index)
        goes_on = last and (last.donor, last.last, last.precision) == (block.donor, block.first, block.precision)
        if last and goes_on and joint is None:
            merged[-1] = replace(last, last=block.last)
        else:
            merged.append(block)
            joints.append(joint)
    return merged, tuple(joints)


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
    with `one_per_set`, whose input it can make without making up places; its form is what the partition says. A donor's
    own next block follows without one; a block reaches to that one's set, and what lies between there and the next
    block's set is left out. Raises DercError where `timed` names no block of this partition.
    """
    chains = partition.blocks.values()
    blocks = tuple(variants((block for chain in chains for block in chain), timed))
    if not blocks:
        raise DercError("the latency table has no block of this partition: profile the zoo again")
    sets = 1 + max(block.set for chain in chains for block in chain)
    at = np.array([block.set for block in blocks])
    ahead = at[None, :] == at[:, None] + 1 if one_per_set else at[None, :] > at[:, None]
    ends = Ends.of(cuts, blocks, partition.forms)
    tail, head = np.nonzero(ahead & (ends.joined | ends.legal))
    last = np.array([not heads or block.donor in heads for block in blocks]) & (at == sets - 1)
    tail, head = with_ends(tail, head, at == 0, last)
    begins = {(block.donor, block.first): block.set for chain in chains for block in chain}
    reach = np.array([begins.get((block.donor, block.last), sets) for block in blocks])
    inner = (tail >= 0) & (head < len(blocks))
    skipped = np.where(inner, np.maximum(at[head % len(blocks)] - reach[tail], 0), 0)
    return assembled(cuts, blocks, sets, at, ends, tail, head, skipped, weights or {})


def with_ends(tail: Array, head: Array, first: Array, last: Array) -> tuple[Array, Array]:
    """The edges with those from the input to the marked `first` blocks and from the `last` ones to the output."""
    starts, stops = np.flatnonzero(first), np.flatnonzero(last)
    tail = np.concatenate([np.full(len(starts), -1), tail, stops])
    return tail, np.concatenate([starts, head, np.full(len(stops), len(first))])


def assembled(
    cuts: CutZoo,
    blocks: tuple[BlockRef, ...],
    sets: int,
    depth: Array,
    ends: Ends,
    tail: Array,
    head: Array,
    skipped: Array,
    weights: Mapping[str, int],
    whole: Mapping[str, tuple[BlockRef, ...]] | None = None,
) -> Layered:
    """The graph of these edges with the costs of their blocks and stitches."""
    own = {name: np.append(column, 0)[head] for name, column in _own(cuts, blocks, weights).items()}
    inner = (tail >= 0) & (head < len(blocks))
    stitched = inner.copy()
    stitched[inner] = ~ends.joined[tail[inner], head[inner]]
    kinds, keys, costs = ends.stitches(tail[stitched], head[stitched])
    stitch = np.full(len(tail), -1)
    stitch[stitched] = kinds
    added = np.zeros((3, len(tail)), np.int64)
    added[:, stitched] = costs[kinds].T
    columns = {
        "params": own["params"] + added[0],
        "macs": own["macs"] + added[1],
        "weights": own["weights"] + BYTES["fp32"] * added[0],
        "activation": np.maximum(own["activation"], added[2]),
    }
    return Layered(blocks, sets, depth, tail, head, columns, stitch, keys, skipped, whole or {})


def _own(cuts: CutZoo, blocks: tuple[BlockRef, ...], weights: Mapping[str, int]) -> dict[str, Array]:
    """Costs of the blocks alone, (blocks)."""
    totals = {
        name: np.cumsum([[0, 0], *((unit.params, unit.macs) for unit in donor.units)], axis=0)
        for name, donor in cuts.donors.items()
    }
    spans = [totals[b.donor][b.last] - totals[b.donor][b.first] for b in blocks]
    params, macs = np.array(spans, np.int64).T
    known = [weights.get(str(b), BYTES[b.precision] * int(p)) for b, p in zip(blocks, params, strict=True)]
    largest = [max(unit.bytes for unit in cuts.donors[b.donor].units[b.first : b.last]) for b in blocks]
    return {"params": params, "macs": macs, "weights": np.array(known), "activation": np.array(largest)}


def variants(blocks: Iterable[BlockRef], timed: Collection[str] | None) -> Iterator[BlockRef]:
    """The blocks in each precision that `timed` names, in float32 alone where it is None."""
    for block in blocks:
        forms = [replace(block, precision=precision) for precision in PRECISIONS]
        yield from [block] if timed is None else [form for form in forms if str(form) in timed]
