"""The paper's own partition, as its text has it (DeRy, Yang et al. 2022, section 3.2), to compare derc's with.

Random restarts, 200 by default. A restart draws a partition of every donor and a centre block for each equivalence set,
then alternates until nothing changes: every boundary of every donor, one at a time, goes to the cut with which the two
blocks beside it are most like their nearest centres; every block joins the set of its nearest centre; every set's
centre becomes the member most like all others. The best restart counts.

Two things are as derc has them, so that the comparison is one of the searches alone: the size bounds (the same menus),
and what a partition is worth (block k of every donor in set k). The sets that the assignment to centres gives are
counted beside it: how often one comes out empty, or holds two blocks of a donor.

The text says nothing of where centres come from. `anywhere` draws any K blocks, `covering` one of every place, which is
kinder: the better of both is what derc is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from derc.artifacts import Array
from derc.equivalence import Menu, Zoo

RESTARTS = 200
ROUNDS = 50
Reach = Callable[[Array, Array, "range", int, int], int]


@dataclass(frozen=True)
class Answer:
    """The best restart's cuts (donors, places), its objective, and the share of restarts with a broken set."""

    cuts: Array
    objective: float
    rounds: float
    empty: float
    doubled: float


def one_by_one(into: Array, out: Array, cuts: range, before: int, after: int) -> int:
    """The best cut for one boundary between two others, candidate after candidate and centre after centre.

    `into[k, c]` is how like cut c is to the input of centre k, `out[k, c]` to its output.
    """
    best, chosen = -np.inf, cuts[0]
    for cut in cuts:
        left = max(into[k, before] + out[k, cut] for k in range(len(into)))
        right = max(into[k, cut] + out[k, after] for k in range(len(into)))
        if left + right > best:
            best, chosen = left + right, cut
    return chosen


def at_once(into: Array, out: Array, cuts: range, before: int, after: int) -> int:
    """The same for all candidates in one step."""
    window = slice(cuts[0], cuts[-1] + 1)
    left = (into[:, before, None] + out[:, window]).max(axis=0)
    right = (into[:, window] + out[:, after, None]).max(axis=0)
    return cuts[int((left + right).argmax())]


def partition(
    zoo: Zoo, seed: int, restarts: int = RESTARTS, *, centres: str = "anywhere", reach: Reach = one_by_one
) -> Answer:
    """The best of so many restarts; `reach` finds a boundary's best cut, both ways of it the same one."""
    random, search = np.random.default_rng(seed), _Restart(zoo, centres, reach)
    best, value, rounds, empty, doubled = None, -np.inf, 0, 0, 0
    for _ in range(restarts):
        cuts, assigned, spent = search.run(random)
        reached = float(zoo.objective(cuts[None])[0])
        rounds += spent
        empty += len(np.unique(assigned)) < zoo.blocks
        doubled += any(len(np.unique(row)) < zoo.blocks for row in assigned)
        if best is None or reached > value:
            best, value = cuts, reached
    if best is None:
        raise ValueError("at least one restart is needed")
    return Answer(best, value, rounds / restarts, empty / restarts, doubled / restarts)


def random_cuts(menu: Menu, blocks: int, random: np.random.Generator) -> Array:
    """Cuts drawn place after place among those that leave the rest a way to the end."""
    alive = [np.zeros(len(menu.before), bool) for _ in range(blocks)]
    alive[-1][-1] = True
    for j in range(blocks - 2, -1, -1):
        for cut in range(int(menu.low[j]), int(menu.high[j]) + 1):
            alive[j][cut] = menu.allows(cut, np.flatnonzero(alive[j + 1])).any()
    cuts, here = [], 0
    for j in range(blocks - 1):
        ahead = np.flatnonzero(alive[j])
        here = int(random.choice(ahead[menu.allows(here, ahead)]))
        cuts.append(here)
    return np.array(cuts, np.int64)


class _Restart:
    def __init__(self, zoo: Zoo, centres: str, reach: Reach) -> None:
        self.zoo, self.centres, self.reach = zoo, centres, reach

    def run(self, random: np.random.Generator) -> tuple[Array, Array, int]:
        """Cuts (donors, places), the set that each block (donors, blocks) is nearest to, and the rounds it took."""
        zoo = self.zoo
        bounds = np.stack([self._bounds(menu, random_cuts(menu, zoo.blocks, random)) for menu in zoo.menus])
        centre = self._draw(bounds, random)
        assigned, spent = np.zeros((len(zoo.menus), zoo.blocks), np.int64), 0
        for spent in range(1, ROUNDS + 1):
            before = bounds.copy(), assigned.copy()
            into, out = self._alike(centre[:, 0]), self._alike(centre[:, 1])
            for d, menu in enumerate(zoo.menus):
                self._move(menu, bounds[d], into[:, menu.rows], out[:, menu.rows])
            rows = zoo.starts[:, None] + bounds
            likeness = into[:, rows[:, :-1]] + out[:, rows[:, 1:]]
            assigned = likeness.argmax(axis=0)
            if spent > 1 and np.array_equal(before[0], bounds) and np.array_equal(before[1], assigned):
                break
            centre = self._recentre(rows, assigned, centre)
        return bounds[:, 1:-1], assigned, spent

    def _bounds(self, menu: Menu, cuts: Array) -> Array:
        return np.concatenate([[0], cuts, [len(menu.width) - 1]])

    def _draw(self, bounds: Array, random: np.random.Generator) -> Array:
        """(blocks, 2): the rows of the input and output of K centres."""
        donors, blocks = len(bounds), self.zoo.blocks
        if self.centres == "covering":
            chosen = random.integers(0, donors, blocks) * blocks + np.arange(blocks)
        else:
            chosen = random.choice(donors * blocks, blocks, replace=False)
        rows, number = self.zoo.starts[chosen // blocks], chosen % blocks
        which = chosen // blocks
        return np.stack([rows + bounds[which, number], rows + bounds[which, number + 1]], axis=1)

    def _alike(self, rows: Array) -> Array:
        """(len(rows), all cuts)."""
        if self.zoo.rows is None:
            found: Array = self.zoo.similarity[rows]
        else:
            found = self.zoo.rows[rows] @ self.zoo.rows.T
        return found

    def _move(self, menu: Menu, bounds: Array, into: Array, out: Array) -> None:
        """Every boundary of one donor in turn, its neighbours as they are."""
        for j in range(1, self.zoo.blocks):
            before, after = int(bounds[j - 1]), int(bounds[j + 1])
            every = np.arange(before + 1, after)
            fitting = every[menu.allows(before, every) & menu.allows(every, after)]
            bounds[j] = self.reach(into, out, range(int(fitting[0]), int(fitting[-1]) + 1), before, after)

    def _recentre(self, rows: Array, assigned: Array, centre: Array) -> Array:
        """Each set's member that is most like all others; an empty set keeps its centre."""
        fresh = centre.copy()
        for k in range(self.zoo.blocks):
            donor, number = np.nonzero(assigned == k)
            if len(donor):
                ends = rows[donor, number], rows[donor, number + 1]
                best = sum(self._summed(end) for end in ends).argmax()
                fresh[k] = ends[0][best], ends[1][best]
        return fresh

    def _summed(self, rows: Array) -> Array:
        if self.zoo.rows is not None:
            chosen = self.zoo.rows[rows].astype(np.float64)
            found: Array = chosen @ chosen.sum(axis=0)
        else:
            found = self.zoo.similarity[np.ix_(rows, rows)].sum(axis=1)
        return found
