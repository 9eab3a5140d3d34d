"""The partition with centres: each equivalence set has a central block, and every block counts by how like it is to it.

This is the objective that the paper writes down (DeRy, Yang et al. 2022, section 3.2): Σ over sets k and donors d of
S(B_dk, centre_k), S(B, B') = s(in, in') + s(out, out'), a centre being one of the set's own blocks. Given the centres'
donors and all others' cuts, one donor's best cuts are an exact dynamic program still, also where it gives a centre;
given the cuts, each set's best centre is its medoid. Alternating between both never lowers the objective.
"""

from __future__ import annotations

import numpy as np

from derc.artifacts import Array
from derc.equivalence import ROUNDING, Zoo, best_path
from derc.equivalence_search import PATIENCE, SHAKE, SWEEPS, Matrix, cut_numbers, drawn, initial


def search(zoo: Zoo, starts: int, seed: int) -> tuple[Array, Array]:
    """Best choice found, cut numbers (donors, places), and the donors of the sets' centres (blocks)."""
    if zoo.places == 0:
        none = np.zeros((len(zoo.menus), 0), np.int64)
        return none, medoids(zoo, none)[0]
    random, centred = np.random.default_rng(seed), _Centred(zoo)
    best, value = centred.ascend(initial(zoo, starts, random))
    failures = 0
    while failures < PATIENCE:
        redraw = random.random((starts, len(zoo.menus), 1)) < SHAKE
        found, reached = centred.ascend(np.where(redraw, drawn(zoo, starts, random), best))
        failures = 0 if reached > value + ROUNDING * len(zoo.menus) else failures + 1
        if reached > value:
            best, value = found, reached
    cuts = cut_numbers(zoo, best)
    return cuts, medoids(zoo, cuts)[0]


def medoids(zoo: Zoo, cuts: Array) -> tuple[Array, float]:
    """Each set's central donor (blocks) for cut numbers (donors, places), and the objective with these centres."""
    ends = np.array([len(menu.width) - 1 for menu in zoo.menus])
    rows = zoo.starts[:, None] + np.column_stack([np.zeros_like(ends), cuts, ends])
    totals = zoo.totals(rows)
    each = np.stack([totals[j, :, j] for j in range(zoo.blocks + 1)])
    score = each[:-1] + each[1:]
    return score.argmax(axis=1), float(score.max(axis=1).sum())


class _Centred:
    """Ascent of one zoo, many starts at once."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, self.matrix, self.size = zoo, Matrix(zoo), zoo.windows.size
        ends = zoo.starts, zoo.starts + [len(menu.width) - 1 for menu in zoo.menus]
        alike = [zoo.similarity[np.ix_(rows, rows)] for rows in ends]
        self.ends = [(square.sum(axis=0) - square.diagonal()) for square in alike]

    def ascend(self, choices: Array) -> tuple[Array, float]:
        """The best of all starts after none of them can be improved, with its value."""
        choices = choices.copy()
        totals = self.matrix.totals(choices)
        centres, values = self._centres(choices, totals)
        for _ in range(SWEEPS):
            before = choices.copy(), centres.copy()
            for d in range(choices.shape[1]):
                self._move(choices, totals, centres, d)
            centres, values = self._centres(choices, totals)
            if np.array_equal(before[0], choices) and np.array_equal(before[1], centres):
                break
        winner = int(values.argmax())
        return choices[winner], float(values[winner])

    def _move(self, choices: Array, totals: Array, centres: Array, d: int) -> None:
        """Give donor d its best cuts in every start, and bring the totals up to date."""
        window = slice(d * self.size, (d + 1) * self.size)
        worth, mine = np.zeros((*totals.shape[:2], self.size)), window.start + np.arange(self.size)
        starts, places = np.arange(len(choices))[:, None], np.arange(self.zoo.places)[None, :]
        for near in (centres[:, :-1], centres[:, 1:]):
            column = near * self.size + choices[starts, near, places]
            toward = self.matrix.alike[places[:, :, None], column[:, :, None], mine]
            worth += np.where((near == d)[:, :, None], totals[:, :, window], toward)
        better = best_path(worth - self.zoo.windows.dislike[d], self.zoo.windows.barrier[d][None])
        start, place = np.nonzero(better != choices[:, d])
        totals[start, place] += self.matrix.alike[place, window.start + better[start, place]]
        totals[start, place] -= self.matrix.alike[place, window.start + choices[start, d, place]]
        choices[:, d] = better

    def _centres(self, choices: Array, totals: Array) -> tuple[Array, Array]:
        """Each start's central donors (starts, blocks) and its objective less the dislike of wide cuts."""
        starts, donors, places = np.ogrid[: len(choices), : choices.shape[1], : self.zoo.places]
        inside = totals[starts, places, donors * self.size + choices].transpose(2, 0, 1)
        shape = inside.shape[1:]
        each = np.stack([np.broadcast_to(self.ends[0], shape), *inside, np.broadcast_to(self.ends[1], shape)])
        score = each[:-1] + each[1:] - ROUNDING * np.arange(shape[1])
        dislike = self.zoo.windows.dislike[donors[0], places[0], choices].sum(axis=(1, 2))
        values: Array = score.max(axis=2).sum(axis=0) - dislike
        return score.argmax(axis=2).T, values
