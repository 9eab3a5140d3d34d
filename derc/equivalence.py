"""Equivalence sets: where to cut every donor so that blocks at the same place of different donors are alike.

The objective sums S(B, B') = s(in, in') + s(out, out') over equivalence sets and donor pairs (DeRy, Yang et al. 2022,
section 3.2). Each interior cut ends one block and begins the next, so it counts twice, and one donor's best cuts given
all the others' are an exact dynamic program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc.artifacts import Array, CutDonor, CutId, CutZoo, EmbeddedZoo
from derc.errors import UsageError

TIE = 1e-9
SWEEPS = 100
SHAKE = 0.25
PATIENCE = 2


@dataclass(frozen=True)
class Menu:
    """One donor's choice: `allowed[p, q]` where a block may span cuts p to q, `slack` the ε that this takes.

    `start` is the row of its first cut in the zoo's similarity; `width` is each cut's size relative to the widest.
    """

    name: str
    start: int
    allowed: Array
    width: Array
    share: Array
    slack: float

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.width))


@dataclass(frozen=True)
class Zoo:
    """The donors' menus and the similarity of all their cuts, in the menus' order."""

    menus: tuple[Menu, ...]
    similarity: Array
    blocks: int

    @cached_property
    def starts(self) -> Array:
        return np.array([menu.start for menu in self.menus])

    @cached_property
    def fixed(self) -> float:
        """The part of the objective that inputs and outputs contribute, whatever the cuts."""
        ends = [self.starts, self.starts + [len(menu.width) - 1 for menu in self.menus]]
        return sum(_pairs(self.similarity[np.ix_(rows, rows)]) for rows in ends)

    def objective(self, choices: Array) -> Array:
        """Objective of each row of `choices`, cut numbers of shape (starts, donors, blocks − 1)."""
        rows = self.starts[:, None] + choices
        alike: Array = self.similarity[rows[:, :, None, :], rows[:, None, :, :]].sum(axis=(1, 2, 3))
        itself: Array = self.similarity[rows, rows].sum(axis=(1, 2))
        total: Array = self.fixed + alike - itself
        return total

    def widths(self, choices: Array) -> Array:
        """Summed relative width of the chosen cuts, for each row of `choices`."""
        width = [menu.width[choices[:, d]].sum(axis=1) for d, menu in enumerate(self.menus)]
        total: Array = np.stack(width).sum(axis=0)
        return total


def _pairs(square: Array) -> float:
    return float(square.sum() - np.trace(square)) / 2


def prepare(cuts: CutZoo, embedded: EmbeddedZoo, blocks: int, epsilon: float) -> Zoo:
    """The zoo as arrays. Raises UsageError for a donor with fewer than `blocks` units."""
    position, rows, menus = embedded.position, list[int](), list[Menu]()
    for name, donor in cuts.donors.items():
        menus.append(_menu(name, donor, len(rows), blocks, epsilon))
        rows += [position[CutId(name, cut)] for cut in range(len(donor.cuts))]
    similarity = embedded.similarity[np.ix_(rows, rows)].astype(np.float64)
    return Zoo(tuple(menus), (similarity + similarity.T) / 2, blocks)


def _menu(name: str, donor: CutDonor, start: int, blocks: int, epsilon: float) -> Menu:
    units = len(donor.units)
    if units < blocks:
        raise UsageError(
            f"donor {name} has {units} units and cannot be split into {blocks} blocks: "
            f"use --blocks {units} or fewer, or leave this donor out of the zoo"
        )
    before = np.concatenate([[0], np.cumsum([unit.macs for unit in donor.units])]).astype(np.float64)
    size = np.where(np.tri(units + 1, dtype=bool), np.inf, before[None, :] - before[:, None])
    fair = before[-1] / blocks
    limit = max((1 + epsilon) * fair, _least_largest(size, blocks))
    width = np.array([cut.type.numel for cut in donor.cuts], np.float64)
    slack = max(epsilon, limit / fair - 1) if fair else epsilon
    return Menu(name, start, size <= limit * (1 + 1e-12), width / width.max(), before / max(before[-1], 1), slack)


def _least_largest(size: Array, blocks: int) -> float:
    """Smallest attainable size of the largest of `blocks` blocks."""
    largest = size[0]
    for _ in range(blocks - 1):
        largest = np.maximum(largest[:, None], size).min(axis=0)
    return float(largest[-1])


def best_cuts(menu: Menu, worth: Array) -> Array:
    """Most valuable allowed cuts, (starts, blocks − 1), for `worth` of shape (starts, blocks − 1, cuts); exact."""
    starts, interior, _ = worth.shape
    if interior == 0:
        return np.zeros((starts, 0), np.int64)
    reach = np.where(menu.allowed, 0.0, -np.inf)
    value, came = worth[:, 0] + reach[0], list[Array]()
    for j in range(1, interior):
        options = value[:, :, None] + reach
        came.append(options.argmax(axis=1))
        value = options.max(axis=1) + worth[:, j]
    chosen = [(value + reach[:, -1]).argmax(axis=1)]
    for back in reversed(came):
        chosen.append(back[np.arange(starts), chosen[-1]])
    return np.stack(chosen[::-1], axis=1)


def ascend(zoo: Zoo, choices: Array) -> Array:
    """Improve every row of `choices` (starts, donors, blocks − 1) until no single donor can; narrower cuts win ties."""
    choices = choices.copy()
    total = zoo.similarity[zoo.starts[:, None] + choices].sum(axis=1)
    for _ in range(SWEEPS):
        before = choices.copy()
        for d, menu in enumerate(zoo.menus):
            total -= zoo.similarity[menu.start + choices[:, d]]
            choices[:, d] = best_cuts(menu, total[:, :, menu.rows] - TIE * menu.width)
            total += zoo.similarity[menu.start + choices[:, d]]
        if np.array_equal(before, choices):
            break
    return choices


def initial(zoo: Zoo, starts: int, random: np.random.Generator) -> Array:
    """Starting points: cuts at equal shares of the MACs, then alignment to each donor's, then random allowed cuts."""
    quantile = np.stack([_near_quantiles(menu, zoo.blocks) for menu in zoo.menus], axis=1)
    aligned = [_align(zoo, d, quantile[0, d]) for d in range(min(len(zoo.menus), starts // 2))]
    left = max(starts - 1 - len(aligned), 0)
    rows = [quantile, *aligned] + ([_random(zoo, left, random)] if left else [])
    return np.concatenate(rows)


def _near_quantiles(menu: Menu, blocks: int) -> Array:
    wanted = np.arange(1, blocks) / blocks
    return best_cuts(menu, -np.abs(wanted[:, None] - menu.share)[None])


def _align(zoo: Zoo, leader: int, cuts: Array) -> Array:
    """Every donor's cuts most similar to those of one of them, as one row."""
    worth = zoo.similarity[zoo.menus[leader].start + cuts]
    rows = [best_cuts(menu, worth[None, :, menu.rows] - TIE * menu.width) for menu in zoo.menus]
    rows[leader] = cuts[None]
    return np.stack(rows, axis=1)


def _random(zoo: Zoo, starts: int, random: np.random.Generator) -> Array:
    shape = (starts, zoo.blocks - 1)
    return np.stack([best_cuts(menu, random.random((*shape, len(menu.width)))) for menu in zoo.menus], axis=1)


def search(zoo: Zoo, starts: int, seed: int) -> Array:
    """Best choice found, (donors, blocks − 1): coordinate ascent from many starts, then perturbation of the best.

    A round redraws a quarter of the best choice's donors in each start; two rounds without progress end the search.
    """
    random = np.random.default_rng(seed)
    best, value = _champion(zoo, ascend(zoo, initial(zoo, starts, random)))
    failures = 0
    while failures < PATIENCE:
        redraw = random.random((starts, len(zoo.menus), 1)) < SHAKE
        shaken = np.where(redraw, _random(zoo, starts, random), best)
        found, reached = _champion(zoo, ascend(zoo, shaken))
        failures = 0 if reached > value + TIE else failures + 1
        if reached > value:
            best, value = found, reached
    return best


def _champion(zoo: Zoo, choices: Array) -> tuple[Array, float]:
    value = zoo.objective(choices) - TIE * zoo.widths(choices)
    winner = int(value.argmax())
    return choices[winner], float(value[winner])
