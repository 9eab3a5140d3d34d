"""Searches to compare with: the published selection loop, random search, and regularised evolution.

All are written from their papers' texts. Each takes `value`, the true proxy of an assembly (higher is better), asks it
at most `budget` times for distinct assemblies, and returns them in order: `Trace`. What was asked before costs nothing,
which favours the loops that come back to where they were.

- `published`: Deep Model Reassembly (Yang et al. 2022, arXiv 2210.17409, section 3.3): all blocks in random order are
  tried, one at a time, in the place of the block of the same equivalence set; a swap stays if the constraints hold and
  the proxy improves. A pass without any improvement starts anew from a random network, until the budget is spent.
- `random_search`: uniform over the networks within the constraints.
- `evolution`: regularised evolution (Real et al. 2019, algorithm 1): the oldest of a population dies, a mutant of the
  best of a sample is born.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from derc.artifacts import Assembly, BlockRef
from derc.layered import Layered

BUDGET = 500
"""Candidates that the paper evaluates."""
POPULATION, SAMPLE = 25, 5
"""Of the evolution: a quarter and a fifth of the paper's 100 and 25, for a budget that is a fortieth of its 20,000."""
PATIENCE = 50
"""Draws without anything new after which a loop gives up."""


@dataclass
class Trace:
    """Assemblies and their values in the order in which they were asked for."""

    value: Callable[[Assembly], float]
    budget: int
    seen: dict[Assembly, float] = field(default_factory=dict)

    def ask(self, assembly: Assembly) -> float:
        """The value; only new assemblies count against the budget."""
        if assembly not in self.seen:
            self.seen[assembly] = self.value(assembly)
        return self.seen[assembly]

    @property
    def spent(self) -> bool:
        return len(self.seen) >= self.budget

    @property
    def values(self) -> list[float]:
        return list(self.seen.values())


@dataclass(frozen=True)
class Space:
    """The assemblies of a graph with one block of each equivalence set, and `allowed`, those within the constraints."""

    graph: Layered
    allowed: tuple[Assembly, ...]

    def legal(self, blocks: Sequence[BlockRef]) -> Assembly | None:
        """The assembly of these blocks, None where it is not within the constraints."""
        return self._index.get(tuple(blocks))

    @cached_property
    def _index(self) -> dict[tuple[BlockRef, ...], Assembly]:
        return {assembly.blocks: assembly for assembly in self.allowed}


def published(space: Space, trace: Trace, seed: int) -> None:
    """The published selection loop, begun anew where no swap improves, until the budget is spent."""
    chance = random.Random(seed)
    while not trace.spent and len(trace.seen) < len(space.allowed):
        current = chance.choice(space.allowed)
        value, improved = trace.ask(current), True
        while improved and not trace.spent:
            improved = False
            blocks = list(space.graph.blocks)
            chance.shuffle(blocks)
            for block in blocks:
                swapped = [block if one.set == block.set else one for one in current.blocks]
                candidate = space.legal(swapped)
                if candidate is None or candidate == current or trace.spent:
                    continue
                other = trace.ask(candidate)
                if other > value:
                    current, value, improved = candidate, other, True


def random_search(space: Space, trace: Trace, seed: int) -> None:
    """Uniformly random networks, none twice."""
    order = list(space.allowed)
    random.Random(seed).shuffle(order)
    for assembly in order[: trace.budget]:
        trace.ask(assembly)


def evolution(space: Space, trace: Trace, seed: int) -> None:
    """Regularised evolution; a mutant has one block exchanged for another of its equivalence set."""
    chance = random.Random(seed)
    count = min(POPULATION, len(space.allowed), trace.budget)
    population = deque((one, trace.ask(one)) for one in chance.sample(space.allowed, count))
    idle = 0
    while not trace.spent and idle < PATIENCE * PATIENCE:
        known = len(trace.seen)
        parent = max(chance.sample(list(population), min(SAMPLE, len(population))), key=lambda pair: pair[1])[0]
        child = mutant(space, parent, chance)
        population.append((child, trace.ask(child)))
        population.popleft()
        idle = idle + 1 if len(trace.seen) == known else 0


def mutant(space: Space, parent: Assembly, chance: random.Random) -> Assembly:
    """The parent with one block exchanged, within the constraints; the parent itself where no try succeeds."""
    for _ in range(PATIENCE):
        block = chance.choice(space.graph.blocks)
        child = space.legal([block if one.set == block.set else one for one in parent.blocks])
        if child is not None and child != parent:
            return child
    return parent


METHODS = {"published": published, "random": random_search, "evolution": evolution}
