"""Equivalence sets: where to cut every donor so that blocks at the same place of different donors are alike.

The objective sums S(B, B') = s(in, in') + s(out, out') over equivalence sets and donor pairs (DeRy, Yang et al. 2022,
section 3.2). Each interior cut ends one block and begins the next, so it counts twice, and one donor's best cuts given
all the others' are an exact dynamic program. The bounds on the blocks' sizes leave each place a window of cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc.artifacts import Array, CutDonor, CutId, CutZoo, EmbeddedZoo
from derc.errors import UsageError

TIE = 1e-9
"""What a cut's width, relative to its donor's widest, counts in the objective: it decides between equals alone."""
ROUNDING = 1e-12


@dataclass(frozen=True)
class Menu:
    """One donor's choice: place j (0 … blocks − 2) is one of the cuts `low[j]` … `high[j]`, and no other can be.

    `start` is the row of its first cut in the zoo's similarity; `before` the MACs in front of each cut, `limit` what a
    block may have at most, `width` each cut's size relative to the widest, `slack` the ε that the limit amounts to.
    """

    name: str
    start: int
    before: Array
    limit: float
    width: Array
    slack: float
    low: Array
    high: Array

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.width))

    @cached_property
    def size(self) -> int:
        """Cuts in its widest window."""
        return int((self.high - self.low).max(initial=0)) + 1

    def allows(self, first: Array | int, last: Array | int) -> Array:
        """Whether a block may span cuts `first` to `last`, elementwise."""
        size = self.before[last] - self.before[first]
        fits: Array = (np.asarray(first) < last) & (size <= self.limit)
        return fits

    @cached_property
    def share(self) -> Array:
        """Of the donor's MACs, in front of each cut."""
        share: Array = self.before / max(self.before[-1], 1)
        return share


@dataclass(frozen=True)
class Windows:
    """All donors' windows side by side, `size` wide; `cut` (donors, places, size) with the last repeated to fill up.

    `dislike` is a small number by which a cut falls back behind an equal one (the narrower wins, then the earlier), inf
    where `cut` only fills up; `barrier` (donors, places − 1, size, size) is 0 where a choice at the next place (first
    index) may follow one at this, else −inf.
    """

    cut: Array
    dislike: Array
    barrier: Array

    @property
    def size(self) -> int:
        return int(self.cut.shape[-1])


@dataclass(frozen=True)
class Zoo:
    """The donors' menus with the similarity of all their cuts, in the menus' order, or `rows` whose products are that.

    Where there are rows, `similarity` is empty.
    """

    menus: tuple[Menu, ...]
    similarity: Array
    blocks: int
    rows: Array | None = None

    @cached_property
    def starts(self) -> Array:
        return np.array([menu.start for menu in self.menus])

    @property
    def places(self) -> int:
        return self.blocks - 1

    @cached_property
    def fixed(self) -> float:
        """The part of the objective that inputs and outputs contribute, whatever the cuts."""
        ends = self.starts, self.starts + [len(menu.width) - 1 for menu in self.menus]
        return sum(self.pairs(rows) for rows in ends)

    def pairs(self, cuts: Array) -> float:
        """Summed similarity of all pairs of the given cuts, by row."""
        if self.rows is not None:
            chosen = self.rows[cuts].astype(np.float64)
            return float((chosen.sum(axis=0) ** 2).sum() - (chosen**2).sum()) / 2
        square = self.similarity[np.ix_(cuts, cuts)]
        return float(square.sum() - np.trace(square)) / 2

    def totals(self, chosen: Array) -> Array:
        """(places, donors, …): how like cuts are, by row, to all other donors' cuts at a place.

        `chosen` (donors, places) are the rows at each place, and what they are compared with: [j, d, k] is the summed
        similarity of donor d's cut at place k to the others' at place j.
        """
        if self.rows is not None:
            cuts = self.rows[chosen].astype(np.float64)
            own = np.einsum("djm,dkm->jdk", cuts, cuts)
            found: Array = np.einsum("jm,dkm->jdk", cuts.sum(axis=0), cuts) - own
            return found
        alike = self.similarity[chosen[:, :, None, None], chosen[None, None, :, :]]
        every = np.arange(len(chosen))
        alike[every, :, every, :] = 0
        total: Array = alike.sum(axis=0)
        return total

    def objective(self, choices: Array) -> Array:
        """Objective of each row of `choices`, cut numbers of shape (starts, donors, places)."""
        inside = [2 * sum(self.pairs(cuts) for cuts in (self.starts[:, None] + one).T) for one in choices]
        return self.fixed + np.array(inside)

    def widths(self, choices: Array) -> Array:
        """Summed relative width of the chosen cuts, for each row of `choices`."""
        width = [menu.width[choices[:, d]].sum(axis=1) for d, menu in enumerate(self.menus)]
        total: Array = np.stack(width).sum(axis=0)
        return total

    @cached_property
    def windows(self) -> Windows:
        size = max(menu.size for menu in self.menus)
        parts = [_window(menu, size) for menu in self.menus]
        cut, dislike, barrier = (np.stack(part) for part in zip(*parts, strict=True))
        return Windows(cut, dislike, barrier)


def _window(menu: Menu, size: int) -> tuple[Array, Array, Array]:
    offset = menu.low[:, None] + np.arange(size)
    cut = np.minimum(offset, menu.high[:, None])
    dislike = np.where(offset > menu.high[:, None], np.inf, TIE * menu.width[cut] + ROUNDING * cut)
    barrier = np.where(menu.allows(cut[:-1, None, :], cut[1:, :, None]), 0.0, -np.inf)
    return cut, dislike, barrier


def prepare(cuts: CutZoo, embedded: EmbeddedZoo, blocks: int, epsilon: float) -> Zoo:
    """The zoo as arrays. Raises UsageError for a donor with fewer than `blocks` units."""
    rows, menus, start = rows_of(cuts, embedded), list[Menu](), 0
    for name, donor in cuts.donors.items():
        menus.append(menu_of(name, donor, start, blocks, epsilon))
        start += len(donor.cuts)
    if embedded.rows is not None:
        return Zoo(tuple(menus), np.zeros((0, 0)), blocks, embedded.rows[rows])
    similarity = embedded.similarity[np.ix_(rows, rows)].astype(np.float64)
    return Zoo(tuple(menus), (similarity + similarity.T) / 2, blocks)


def rows_of(cuts: CutZoo, embedded: EmbeddedZoo) -> list[int]:
    """All donors' cuts in order, as rows of the embedded zoo's index."""
    position = embedded.position
    return [position[CutId(name, cut)] for name, donor in cuts.donors.items() for cut in range(len(donor.cuts))]


def menu_of(name: str, donor: CutDonor, start: int, blocks: int, epsilon: float) -> Menu:
    """What may be chosen of a donor; raises UsageError where it has fewer than `blocks` units."""
    units = len(donor.units)
    if units < blocks:
        raise UsageError(
            f"donor {name} has {units} units and cannot be split into {blocks} blocks: "
            f"use --blocks {units} or fewer, or leave this donor out of the zoo"
        )
    before = np.concatenate([[0], np.cumsum([unit.macs for unit in donor.units])]).astype(np.float64)
    width = np.array([cut.type.numel for cut in donor.cuts], np.float64)
    return make_menu(name, start, before, width / width.max(), blocks, epsilon)


def make_menu(name: str, start: int, before: Array, width: Array, blocks: int, epsilon: float) -> Menu:
    """The menu of a donor with so many MACs in front of each cut; the least slack that it can meet, where ε is less."""
    fair = before[-1] / blocks
    limit = max((1 + epsilon) * fair, _least_largest(before, blocks)) * (1 + 1e-12)
    forward = _reached(before, limit, blocks)
    backward = len(before) - 1 - _reached(before[-1] - before[::-1], limit, blocks)
    low = np.maximum(backward[::-1], np.arange(1, blocks))
    high = np.minimum(forward, len(before) - 1 - np.arange(blocks - 1, 0, -1))
    slack = max(epsilon, limit / (1 + 1e-12) / fair - 1) if fair else epsilon
    return Menu(name, start, before, limit, width, slack, low, high)


def _reached(before: Array, limit: float, blocks: int) -> Array:
    """The last cut that 1, 2, … blocks − 1 blocks of at most `limit` can reach; all before it can be reached too.

    Every unit fits the limit, since some block of some allowed partition holds it.
    """
    reached, cut = list[int](), 0
    for _ in range(blocks - 1):
        cut = int(np.searchsorted(before, before[cut] + limit, side="right")) - 1
        while before[cut] - before[reached[-1] if reached else 0] > limit:
            cut -= 1
        reached.append(cut)
    return np.array(reached, np.int64)


def _least_largest(before: Array, blocks: int) -> float:
    """Smallest attainable size of the largest of `blocks` blocks of at least one unit."""
    size = np.where(np.tri(len(before), dtype=bool), np.inf, before[None, :] - before[:, None])
    largest = size[0]
    for _ in range(blocks - 1):
        largest = np.maximum(largest[:, None], size).min(axis=0)
    return float(largest[-1])


def best_path(worth: Array, barrier: Array) -> Array:
    """Most valuable choices (n, places) of windows, for `worth` (n, places, size) and `barrier` (n or 1, …); exact.

    Every choice whose worth is finite must have one before it that it may follow, as those of windows do.
    """
    n, places, _ = worth.shape
    if places == 0:
        return np.zeros((n, 0), np.int64)
    value, came, every = worth[:, 0], list[Array](), np.arange(n)
    for j in range(1, places):
        came.append((value[:, None, :] + barrier[:, j - 1]).argmax(axis=2))
        value = value[every[:, None], came[-1]] + worth[:, j]
    chosen = np.empty((n, places), np.int64)
    chosen[:, -1] = value.argmax(axis=1)
    for j in range(places - 2, -1, -1):
        chosen[:, j] = came[j][every, chosen[:, j + 1]]
    return chosen


def best_with(worth: Array, barrier: Array) -> Array:
    """For every choice at every place, the most that a path with it is worth: (n, places, size), as `best_path`."""
    forward, backward = worth.copy(), worth.copy()
    for j in range(1, worth.shape[1]):
        forward[:, j] += (forward[:, j - 1, None, :] + barrier[:, j - 1]).max(axis=2)
    for j in range(worth.shape[1] - 2, -1, -1):
        backward[:, j] += (backward[:, j + 1, :, None] + barrier[:, j]).max(axis=1)
    found: Array = forward + backward - np.where(np.isfinite(worth), worth, 0)
    return found
