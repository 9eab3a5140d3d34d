"""The partition's search where all similarities are known: coordinate ascent over donors, many starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc.artifacts import Array
from derc.equivalence import TIE, Zoo, best_path

SWEEPS = 100
SHAKE = 0.25
PATIENCE = 2


@dataclass(frozen=True)
class Matrix:
    """The similarity of what may be chosen: `alike[j]` of all donors' windows at place j, none within a donor."""

    zoo: Zoo

    @cached_property
    def alike(self) -> Array:
        """(places, donors · size, donors · size)."""
        cut = self.zoo.starts[:, None, None] + self.zoo.windows.cut
        rows = cut.transpose(1, 0, 2).reshape(self.zoo.places, -1)
        found: Array = self.zoo.similarity[rows[:, :, None], rows[:, None, :]]
        size = self.zoo.windows.size
        for d in range(len(cut)):
            found[:, d * size : (d + 1) * size, d * size : (d + 1) * size] = 0
        return found

    def ascend(self, choices: Array) -> Array:
        """Improve each of `choices` (starts, donors, places), numbers in windows, until no single donor can."""
        windows, size = self.zoo.windows, self.zoo.windows.size
        done, current, active = choices.copy(), choices.copy(), np.arange(len(choices))
        totals = self.totals(current)
        for _ in range(SWEEPS):
            moved = np.zeros(len(current), bool)
            for d in range(len(windows.cut)):
                own = self.zoo.menus[d].size
                worth = totals[:, :, d * size : d * size + own] - windows.dislike[d, :, :own]
                better = best_path(worth, windows.barrier[d, None, :, :own, :own])
                start, place = np.nonzero(better != current[:, d])
                if len(start):
                    moved[start] = True
                    totals[start, place] += self.alike[place, d * size + better[start, place]]
                    totals[start, place] -= self.alike[place, d * size + current[start, d, place]]
                    current[:, d] = better
            done[active] = current
            if not moved.any():
                break
            active, current, totals = active[moved], current[moved], totals[moved]
        return done

    def totals(self, choices: Array) -> Array:
        """(starts, places, donors · size): how like each cut is to all that is chosen at its place."""
        size, places = self.zoo.windows.size, np.arange(self.zoo.places)
        totals = np.zeros((len(choices), self.zoo.places, self.alike.shape[-1]))
        for d in range(choices.shape[1]):
            totals += self.alike[places, d * size + choices[:, d]]
        return totals

    def values(self, choices: Array) -> Array:
        """What is ascended: the objective's interior part, halved, less the dislike of wide cuts."""
        totals, size = self.totals(choices), self.zoo.windows.size
        donors, places = np.ogrid[: choices.shape[1], : self.zoo.places]
        worth = totals[np.arange(len(choices))[:, None, None], places, donors * size + choices]
        found: Array = worth.sum(axis=(1, 2)) / 2 - self.zoo.windows.dislike[donors, places, choices].sum(axis=(1, 2))
        return found


def search(zoo: Zoo, starts: int, seed: int) -> Array:
    """Best choice found, (donors, places): coordinate ascent from many starts, then perturbation of the best.

    A round redraws a quarter of the best choice's donors in each start; two rounds without progress end the search.
    """
    if zoo.places == 0:
        return np.zeros((len(zoo.menus), 0), np.int64)
    random, matrix = np.random.default_rng(seed), Matrix(zoo)
    best, value = _champion(matrix, matrix.ascend(initial(zoo, starts, random)))
    failures = 0
    while failures < PATIENCE:
        redraw = random.random((starts, len(zoo.menus), 1)) < SHAKE
        found, reached = _champion(matrix, matrix.ascend(np.where(redraw, drawn(zoo, starts, random), best)))
        failures = 0 if reached > value + TIE else failures + 1
        if reached > value:
            best, value = found, reached
    return cut_numbers(zoo, best)


def cut_numbers(zoo: Zoo, choices: Array) -> Array:
    """Cut numbers of `choices` (…, donors, places), which number within windows."""
    donors, places = np.ogrid[: len(zoo.menus), : zoo.places]
    found: Array = zoo.windows.cut[donors, places, choices]
    return found


def _champion(matrix: Matrix, choices: Array) -> tuple[Array, float]:
    values = matrix.values(choices)
    winner = int(values.argmax())
    return choices[winner], float(values[winner])


def initial(zoo: Zoo, starts: int, random: np.random.Generator) -> Array:
    """Starting points: cuts at equal shares of the MACs, then alignment to some donors', then random allowed cuts."""
    quantile = near_quantiles(zoo)
    leaders = range(min(len(zoo.menus), starts // 2))
    rows = [quantile[None], *(aligned(zoo, d, quantile[d])[None] for d in leaders)]
    left = max(starts - 1 - len(leaders), 0)
    return np.concatenate([*rows, drawn(zoo, left, random)])


def near_quantiles(zoo: Zoo) -> Array:
    """(donors, places): cuts near equal shares of the MACs."""
    wanted = (np.arange(1, zoo.blocks) / zoo.blocks)[:, None]
    far = np.stack([np.abs(menu.share[cut] - wanted) for menu, cut in zip(zoo.menus, zoo.windows.cut, strict=True)])
    return best_path(-far - zoo.windows.dislike, zoo.windows.barrier)


def aligned(zoo: Zoo, leader: int, choice: Array) -> Array:
    """(donors, places): every donor's cuts most similar to those of one of them."""
    cuts = zoo.starts[leader] + zoo.windows.cut[leader, np.arange(zoo.places), choice]
    rows = zoo.starts[:, None, None] + zoo.windows.cut
    if zoo.rows is None:
        worth = zoo.similarity[cuts[None, :, None], rows]
    else:
        products = zoo.rows @ zoo.rows[cuts].T
        worth = products[rows, np.arange(zoo.places)[None, :, None]].astype(np.float64)
    found = best_path(worth - zoo.windows.dislike, zoo.windows.barrier)
    found[leader] = choice
    return found


def drawn(zoo: Zoo, starts: int, random: np.random.Generator) -> Array:
    """(starts, donors, places) of random allowed cuts."""
    windows = zoo.windows
    worth = random.random((starts, *windows.cut.shape)) - windows.dislike
    found = [best_path(one, windows.barrier) for one in worth]
    return np.stack(found) if found else np.zeros((0, *windows.cut.shape[:2]), np.int64)
