"""Random selection problems, and their answers by enumerating every path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np

from derc import layered, stitching
from derc.artifacts import (
    Assembly,
    BlockRef,
    CutZoo,
    EmbeddedZoo,
    Evaluated,
    Joint,
    Knowledge,
    LatencyTable,
    Partition,
)
from derc.engine import PRECISIONS
from derc.learnt import Learnt
from derc.passes.partition import PartitionZoo, partition
from derc.passes.select import Select
from derc.stitching import MAPS, PLAIN, REGRIDS, Form
from tests.zoos import latency, random_cuts, random_embedded, table_of

NOTHING = Knowledge()


@dataclass(frozen=True)
class Problem:
    """Everything that `select` reads."""

    cuts: CutZoo
    embedded: EmbeddedZoo
    partition: Partition
    table: LatencyTable

    @property
    def variants(self) -> list[BlockRef]:
        """Every block in every precision that the table knows."""
        blocks = [block for chain in self.partition.blocks.values() for block in chain]
        forms = [replace(block, precision=precision) for block in blocks for precision in PRECISIONS]
        return [form for form in forms if str(form) in self.table.blocks]

    def learn(self, options: Select, knowledge: Knowledge = NOTHING) -> Learnt:
        return options.learn(self.cuts, self.embedded, self.partition, self.table, knowledge)

    def intact(self, donor: str) -> Assembly:
        return Assembly(self.partition.blocks[donor])


def random_problem(
    seed: int,
    sizes: tuple[int, ...],
    blocks: int = 3,
    *,
    accuracy: bool = True,
    lower: tuple[str, ...] = (),
    formed: bool = False,
) -> Problem:
    """`lower` precisions are there for four blocks of five, and one block of twenty could not be built at all.

    Where it is `formed`, half of the stitches that may have another form than the default have one.
    """
    random = np.random.default_rng(seed)
    cuts = random_cuts(seed, sizes)
    embedded = random_embedded(seed, cuts, accuracy=accuracy)
    found = partition(cuts, embedded, PartitionZoo(blocks=blocks, starts=4))
    found = replace(found, forms=random_forms(seed, cuts, found)) if formed else found
    table = random_table(random, cuts, found)
    return Problem(cuts, embedded, found, with_precisions(random, found, table, lower) if lower else table)


def random_forms(seed: int, cuts: CutZoo, found: Partition) -> dict[str, dict[str, Form]]:
    random, blocks = np.random.default_rng(seed), [block for chain in found.blocks.values() for block in chain]
    forms: dict[str, dict[str, Form]] = {}
    for a, b in product(blocks, blocks):
        source, target = cuts.donors[a.donor].cuts[a.last].type, cuts.donors[b.donor].cuts[b.first].type
        if stitching.keeps_places(source, target) and (a.donor, a.last) != (b.donor, b.first):
            every = (Form(regrid, kind) for regrid, kind in product(REGRIDS, MAPS))
            legal = [form for form in every if form != PLAIN and not stitching.obstacle(source, target, form)]
            if legal and random.random() < 0.5:
                form = legal[random.integers(len(legal))]
                forms.setdefault(f"{a.donor}:{a.last}", {})[f"{b.donor}:{b.first}"] = form
    return forms


def with_precisions(
    random: np.random.Generator, found: Partition, table: LatencyTable, lower: tuple[str, ...]
) -> LatencyTable:
    """The table with most blocks in `lower` precisions too, and a few not in float32."""
    blocks, distortion = dict(table.blocks), dict[str, float]()
    for block in (block for chain in found.blocks.values() for block in chain):
        plain = blocks.pop(str(block)) if random.random() < 0.05 else blocks[str(block)]
        for precision in lower:
            if random.random() < 0.8:
                key = str(replace(block, precision=precision))
                blocks[key], distortion[key] = (
                    latency(plain.ms * float(random.uniform(0.3, 1.2))),
                    random.uniform(0, 0.3),
                )
    return replace(table, blocks=blocks or table.blocks, distortion=distortion)


def random_table(random: np.random.Generator, cuts: CutZoo, found: Partition) -> LatencyTable:
    """Blocks at 1 ms per million MACs or so, stitches cheap, intact donors a little off their blocks' sum."""
    blocks, donors = {}, {}
    for name, chain in found.blocks.items():
        for block in chain:
            macs = sum(unit.macs for unit in cuts.donors[name].units[block.first : block.last])
            blocks[str(block)] = macs / 1e6 * float(random.uniform(0.8, 1.2))
        donors[name] = sum(blocks[str(block)] for block in chain) * float(random.uniform(0.8, 1.2))
    stitches = {
        edge.stitch: float(random.uniform(0.05, 0.3))
        for edge in layered.build(cuts, found).edges
        if edge.stitch and not stitching.costs_nothing(edge.stitch)
    }
    return table_of(donors, blocks, stitches)


def random_knowledge(seed: int, learnt: Learnt, count: int) -> Knowledge:
    """Scores, latencies or both of some assemblies, not quite what is predicted."""
    random = np.random.default_rng(seed)
    every = list(paths(learnt))
    seen = []
    for place in random.permutation(len(every))[:count]:
        expected = learnt.predict(every[place])["latency_ms"] or 1.0
        timed = latency(expected * float(random.uniform(0.7, 1.4)))
        scored = float(random.uniform(0.1, 0.95))
        kind = random.integers(3)
        seen.append(Evaluated(every[place], scored if kind else None, timed if kind != 1 else None))
    return Knowledge(tuple(seen))


def legal(problem: Problem, options: Select) -> Iterator[Assembly]:
    """Every assembly, straight from the definition: no use of the layered graph."""
    blocks = problem.variants
    heads = options.heads or tuple(problem.partition.blocks)

    def joins(a: BlockRef, b: BlockRef) -> bool:
        if b.set <= a.set or (options.one_per_set and b.set != a.set + 1):
            return False
        before = problem.cuts.donors[a.donor].cuts[a.last].type
        after = problem.cuts.donors[b.donor].cuts[b.first].type
        return (a.donor == b.donor and a.last == b.first) or stitching.keeps_places(before, after)

    def grow(prefix: tuple[BlockRef, ...]) -> Iterator[Assembly]:
        last = prefix[-1]
        if last.last == len(problem.cuts.donors[last.donor].units) and last.donor in heads:
            yield with_joints(problem.partition, prefix)
        for block in blocks:
            if joins(last, block):
                yield from grow((*prefix, block))

    for block in blocks:
        if block.first == 0:
            yield from grow((block,))


def with_joints(found: Partition, blocks: tuple[BlockRef, ...]) -> Assembly:
    """The assembly of these blocks, with what the partition says of the stitches between them."""
    forms = [found.forms.get(f"{a.donor}:{a.last}", {}).get(f"{b.donor}:{b.first}", PLAIN) for a, b in pairwise(blocks)]
    plain = Assembly(blocks)
    joints = [Joint(form=form) if stitched else None for form, stitched in zip(forms, plain.stitched, strict=True)]
    return Assembly(blocks, (None, *joints)) if any(joint and joint.form != PLAIN for joint in joints) else plain


def paths(learnt: Learnt) -> Iterator[Assembly]:
    """Every path of the layered graph."""

    def grow(prefix: tuple[BlockRef, ...], edges: tuple[int, ...]) -> Iterator[Assembly]:
        for place in learnt.graph.leaving[prefix[-1] if prefix else None]:
            target = learnt.graph.edges[place].target
            if target is None:
                yield learnt.graph.assembly((*edges, place))
            else:
                yield from grow((*prefix, target), (*edges, place))

    yield from grow((), ())


def effective_latency(learnt: Learnt, options: Select, assembly: Assembly) -> float:
    """What the latency budget is compared with."""
    if assembly in learnt.measured:
        return learnt.measured[assembly][1]
    return (learnt.predict(assembly)["latency_ms"] or 0.0) / (1 - options.margin)


def amounts(learnt: Learnt, options: Select, assembly: Assembly) -> dict[str, float]:
    predicted = learnt.predict(assembly)
    return {
        "latency_ms": effective_latency(learnt, options, assembly),
        "params_m": (predicted["params"] or 0) / 1e6,
        "macs_g": (predicted["macs"] or 0) / 1e9,
        "memory_mb": predicted["memory_mb"] or 0,
        "blocks": 1 + sum(assembly.stitched),
    }


def fits(learnt: Learnt, options: Select, assembly: Assembly) -> bool:
    limits = {name: getattr(options, name) for name in ("latency_ms", "params_m", "macs_g", "memory_mb")}
    limits["blocks"] = options.max_blocks
    lower = {name: getattr(options, f"min_{name}") for name in ("latency_ms", "params_m", "macs_g")}
    amount = amounts(learnt, options, assembly)
    small = all(limit is None or amount[name] <= limit * (1 + 1e-9) for name, limit in limits.items())
    return small and all(limit is None or amount[name] >= limit * (1 - 1e-9) for name, limit in lower.items())


def without_accuracy(problem: Problem) -> Problem:
    return replace(problem, embedded=replace(problem.embedded, accuracy={}))
