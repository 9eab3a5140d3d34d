"""partition: the donors' blocks and the equivalence sets that they fall into."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from derc import equivalence, equivalence_program
from derc.artifacts import Array, BlockRef, CutZoo, EmbeddedZoo, Partition
from derc.equivalence import Zoo
from derc.errors import UsageError
from derc.milp import Solver
from derc.pipeline import Context


@dataclass(frozen=True)
class PartitionZoo:
    """Cuts every donor into `blocks` blocks of at most (1 + `epsilon`) times the fair share of its MACs.

    `starts` is the number of starting points of the search. `exact` solves the integer program too, for the bound.
    """

    blocks: int = 4
    epsilon: float = 0.2
    starts: int = 32
    exact: bool = False
    time_limit_s: float = 60.0
    name: ClassVar[str] = "partition"
    produces: ClassVar[type] = Partition

    def inputs(self, context: Context) -> str:
        return f"{context.seed} {context.solver.name if self.exact else ''}"

    def run(self, context: Context, cuts: CutZoo, embedded: EmbeddedZoo) -> Partition:
        return partition(cuts, embedded, self, seed=context.seed, solver=context.solver if self.exact else None)


def partition(
    cuts: CutZoo, embedded: EmbeddedZoo, options: PartitionZoo, *, seed: int = 0, solver: Solver | None = None
) -> Partition:
    """Partition by search, and by integer program too where a `solver` is given; the better answer is returned.

    A block's size is its MACs. A donor that cannot meet the size bound gets the least slack that it can meet.
    Raises UsageError for a donor with fewer units than blocks.
    """
    _check(options, cuts)
    zoo = equivalence.prepare(cuts, embedded, options.blocks, options.epsilon)
    choice, bound = equivalence.search(zoo, options.starts, seed), None
    if solver is not None:
        exact, bound = equivalence_program.solve(zoo, solver, options.time_limit_s)
        choice = _better(zoo, choice, exact)
        bound = max(bound, float(zoo.objective(choice[None])[0]))
    return Partition(
        blocks={
            menu.name: _blocks(menu.name, row, len(menu.width)) for menu, row in zip(zoo.menus, choice, strict=True)
        },
        objective=float(zoo.objective(choice[None])[0]),
        bound=bound,
        epsilon={menu.name: menu.slack for menu in zoo.menus},
    )


def _check(options: PartitionZoo, cuts: CutZoo) -> None:
    if options.blocks < 1:
        raise UsageError(f"--blocks must be at least 1, not {options.blocks}")
    if not options.epsilon >= 0:
        raise UsageError(f"--epsilon must be zero or more, not {options.epsilon}")
    if options.starts < 1:
        raise UsageError(f"the partition needs at least one start, not {options.starts}")
    if not cuts.donors:
        raise UsageError("the zoo has no donors")


def _better(zoo: Zoo, choice: Array, exact: Array | None) -> Array:
    if exact is None:
        return choice
    values = zoo.objective(np.stack([choice, exact]))
    return exact if values[1] > values[0] + equivalence.TIE else choice


def _blocks(donor: str, choice: Array, cuts: int) -> tuple[BlockRef, ...]:
    ends = [0, *map(int, choice), cuts - 1]
    return tuple(BlockRef(donor, first, last, k) for k, (first, last) in enumerate(itertools.pairwise(ends)))
