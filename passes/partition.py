"""partition: the donors' blocks and the equivalence sets that they fall into."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from derc import (
    equivalence,
    equivalence_centres,
    equivalence_checks,
    equivalence_few,
    equivalence_program,
    equivalence_search,
    equivalence_sketch,
)
from derc.artifacts import Array, BlockRef, CutZoo, EmbeddedZoo, NearTie, Partition
from derc.equivalence import Zoo
from derc.errors import UsageError
from derc.milp import Solver
from derc.pipeline import Context

AUTO = "auto"
OBJECTIVES = ("pairs", "centres")
MOST_BLOCKS = 8
"""The most blocks that `auto` tries."""
DISTINCT = 0.8
"""The least share of blocks in every set that must belong there."""
MOST_VARIABLES = 400_000
HALF_STARTS = 8


@dataclass(frozen=True)
class PartitionZoo:
    """Cuts every donor into `blocks` blocks of at most (1 + `epsilon`) times the fair share of its MACs.

    A donor of fewer units has a block of each, in those of the others' sets that they are most like.
    `auto` takes the largest number of blocks, up to 8, whose sets are distinct: in each, at least 80% of the blocks
    would not be more alike in another's place, by the whole probe set and by either half. `objective` sums the
    similarity of all `pairs` of a set's blocks, or of each with the set's central block (`centres`). `starts` is the
    number of starting points of the search. `exact` solves the integer program too, for the bound.
    """

    blocks: int | str = 4
    epsilon: float = 0.2
    starts: int = 16
    exact: bool = False
    time_limit_s: float = 60.0
    objective: str = "pairs"
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
    The objective is that of the donors that have a block in every set. Raises UsageError where no donor has so many
    units, and for a donor of one unit.
    """
    _check(options, cuts, embedded, solver)
    if options.blocks == AUTO:
        return _chosen(cuts, embedded, options, seed, solver)
    many, few = equivalence_few.split(cuts, int(options.blocks))
    found = _partition(many, embedded, options, int(options.blocks), seed, solver)
    if not few.donors:
        return found
    blocks = found.blocks | equivalence_few.placed(few, embedded, found.blocks)
    epsilon = found.epsilon | equivalence_few.slack(few)
    return replace(
        found,
        blocks={name: blocks[name] for name in cuts.donors},
        epsilon={name: epsilon[name] for name in cuts.donors},
    )


def _check(options: PartitionZoo, cuts: CutZoo, embedded: EmbeddedZoo, solver: Solver | None) -> None:
    if options.blocks != AUTO and (not isinstance(options.blocks, int) or options.blocks < 1):
        raise UsageError(f"--blocks must be at least 1, or auto, not {options.blocks}")
    if not options.epsilon >= 0:
        raise UsageError(f"--epsilon must be zero or more, not {options.epsilon}")
    if options.starts < 1:
        raise UsageError(f"the partition needs at least one start, not {options.starts}")
    if options.objective not in OBJECTIVES:
        raise UsageError(f"the partition's objective must be one of {', '.join(OBJECTIVES)}, not {options.objective!r}")
    if not cuts.donors:
        raise UsageError("the zoo has no donors")
    if options.objective == "centres" and solver is not None:
        raise UsageError("--exact proves the objective over pairs alone: leave out --sets centres, or --exact")
    if embedded.rows is not None and (solver is not None or options.objective == "centres"):
        what = "--exact" if solver is not None else "--sets centres"
        raise UsageError(f"{what} needs the similarity of all pairs of cuts, and this zoo is too large: leave it out")


def _chosen(cuts: CutZoo, embedded: EmbeddedZoo, options: PartitionZoo, seed: int, solver: Solver | None) -> Partition:
    """The partition into the largest number of blocks whose sets are distinct, or into 2 where none are."""
    most = min(MOST_BLOCKS, *(len(donor.units) for donor in cuts.donors.values()))
    if len(cuts.donors) == 1:
        return _partition(cuts, embedded, options, min(4, most), seed, solver)
    distinct = dict[int, float]()
    for blocks in range(2, most + 1):
        found = _search(cuts, embedded, options, blocks, seed)
        distinct[blocks] = min(equivalence_checks.distinctness(zoo, found.cuts) for zoo in (found.zoo, *found.halves))
    best = max((blocks for blocks, share in distinct.items() if share >= DISTINCT), default=min(2, most))
    made = _partition(cuts, embedded, options, best, seed, solver)
    return replace(made, distinct={str(blocks): share for blocks, share in distinct.items()})


@dataclass(frozen=True)
class _Found:
    """`cuts` (donors, places), with the same zoo by either half of the probe set."""

    zoo: Zoo
    cuts: Array
    halves: tuple[Zoo, ...]
    centres: Array | None = None


def _search(cuts: CutZoo, embedded: EmbeddedZoo, options: PartitionZoo, blocks: int, seed: int) -> _Found:
    zoo = equivalence.prepare(cuts, embedded, blocks, options.epsilon)
    halves = equivalence_checks.half_zoos(zoo, embedded, equivalence.rows_of(cuts, embedded))
    found, centres = _best_cuts(zoo, options, options.starts, seed)
    return _Found(zoo, found, halves, centres)


def _best_cuts(zoo: Zoo, options: PartitionZoo, starts: int, seed: int) -> tuple[Array, Array | None]:
    if options.objective == "centres":
        return equivalence_centres.search(zoo, starts, seed)
    search = equivalence_search.search if zoo.rows is None else equivalence_sketch.search
    return search(zoo, starts, seed), None


def _partition(
    cuts: CutZoo, embedded: EmbeddedZoo, options: PartitionZoo, blocks: int, seed: int, solver: Solver | None
) -> Partition:
    found, bound = _search(cuts, embedded, options, blocks, seed), None
    zoo, choice, centres = found.zoo, found.cuts, found.centres
    if solver is not None:
        exact, bound = _exact(zoo, solver, options.time_limit_s)
        choice = _better(zoo, choice, exact)
    value = float(zoo.objective(choice[None])[0])
    if centres is not None:
        centres, value = equivalence_centres.medoids(zoo, choice)
    by_halves = [_best_cuts(half, options, min(options.starts, HALF_STARTS), seed)[0] for half in found.halves]
    ties = equivalence_checks.near_ties(zoo, choice, by_halves) if centres is None else ()
    return Partition(
        blocks={
            menu.name: _blocks(menu.name, row, len(menu.width)) for menu, row in zip(zoo.menus, choice, strict=True)
        },
        objective=value,
        bound=None if bound is None else max(bound, value),
        epsilon={menu.name: menu.slack for menu in zoo.menus},
        centres=() if centres is None else tuple(zoo.menus[d].name for d in centres),
        moved=equivalence_checks.moved(choice, by_halves),
        near_ties=tuple(NearTie(zoo.menus[t.donor].name, t.place, t.cut, t.other, t.loss) for t in ties),
    )


def _exact(zoo: Zoo, solver: Solver, time_limit_s: float) -> tuple[Array | None, float]:
    """The integer program's answer; raises UsageError where the program would be too large to write down."""
    variables = equivalence_program.size(zoo)
    if variables > MOST_VARIABLES:
        raise UsageError(
            f"--exact: the program would have {variables} variables, more than {MOST_VARIABLES}: it is for small zoos, "
            "so leave it out, or give fewer donors"
        )
    return equivalence_program.solve(zoo, solver, time_limit_s)


def _better(zoo: Zoo, choice: Array, exact: Array | None) -> Array:
    if exact is None:
        return choice
    values = zoo.objective(np.stack([choice, exact]))
    return exact if values[1] > values[0] + equivalence.TIE else choice


def _blocks(donor: str, choice: Array, cuts: int) -> tuple[BlockRef, ...]:
    ends = [0, *map(int, choice), cuts - 1]
    return tuple(BlockRef(donor, first, last, k) for k, (first, last) in enumerate(itertools.pairwise(ends)))
