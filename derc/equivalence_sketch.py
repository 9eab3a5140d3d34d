"""The partition's search where each cut is a row of length 1 and the similarity of two is their rows' product.

With g the rows, the objective's interior part is Σ_j ‖Σ g at place j‖² less a constant: convex in the choice, so that
letting every donor choose at once against the sums of all chosen rows never lowers it. A sweep is one product of all
rows with the sums and a dynamic program per donor; memory is linear in the number of cuts. Last, donors choose one by
one, each against the sums without its own rows, which is the matrix form's exact step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from derc.artifacts import Array
from derc.equivalence import Zoo, best_path
from derc.equivalence_search import SHAKE, aligned, cut_numbers, drawn, near_quantiles

SWEEPS = 40
POLISHES = 20
STARTS = (2, 8)
"""Fewest and most starting points; a zoo of 1,000 donors gets the most, one of 10,000 four."""
CHOSEN = 40_000
"""Donors times starting points that are swept together."""
SHAKES = 2
CHUNK = 1 << 22
"""Numbers that are brought to float64 at a time."""


class Sketch:
    """The steps of the search on one zoo's rows, all in float64 whatever the rows are kept in."""

    def __init__(self, zoo: Zoo) -> None:
        if zoo.rows is None:
            raise ValueError("the sketched form needs the cuts' rows")
        self.zoo, self.rows, self.windows = zoo, zoo.rows, zoo.windows
        self.at = zoo.starts[:, None, None] + self.windows.cut
        self.donors, self.places = np.ogrid[: len(zoo.menus), : zoo.places]
        self.dislike = self.windows.dislike * len(zoo.menus)

    def sums(self, choices: Array) -> Array:
        """(starts, places, size of a row): the sum of all donors' chosen rows at each place."""
        found = np.zeros((*choices.shape[::2], self.rows.shape[1]))
        for part in self._donors():
            rows = self.at[part][self.donors[: part.stop - part.start], self.places, choices[:, part]]
            found += self.rows[rows].sum(axis=1, dtype=np.float64)
        return found

    def _donors(self, width: int = 0) -> Iterator[slice]:
        step = max(CHUNK // (max(width, self.rows.shape[1]) * max(self.zoo.places, 1)), 1)
        for start in range(0, len(self.at), step):
            yield slice(start, min(start + step, len(self.at)))

    def products(self, sums: Array) -> Array:
        """(cuts, starts · places): every row with every sum."""
        flat = sums.reshape(-1, sums.shape[-1]).T
        found = np.empty((len(self.rows), flat.shape[1]))
        step = max(CHUNK // self.rows.shape[1], 1)
        for start in range(0, len(self.rows), step):
            found[start : start + step] = self.rows[start : start + step].astype(np.float64) @ flat
        return found

    def value(self, sums: Array) -> Array:
        """Half the squared lengths of the sums (starts, places, …), the part of the objective that choices change."""
        found: Array = (sums**2).sum(axis=(1, 2)) / 2
        return found

    def sweep(self, choices: Array, sums: Array) -> Array:
        """Every donor's best choice against the sums, for each start."""
        products = self.products(sums)
        better = np.empty_like(choices)
        for start in range(len(choices)):
            columns = start * self.zoo.places + self.places[0]
            for part in self._donors(self.windows.size**2):
                worth = products[self.at[part], columns[None, :, None]] - self.dislike[part]
                better[start, part] = best_path(worth, self.windows.barrier[part])
        return better

    def climb(self, choices: Array) -> tuple[Array, Array]:
        """Sweeps until nothing moves or the value no longer rises: the choices and their values."""
        choices, sums = choices.copy(), self.sums(choices)
        values, active = self.value(sums), np.arange(len(choices))
        for _ in range(SWEEPS):
            better = self.sweep(choices[active], sums[active])
            changed = (better != choices[active]).any(axis=(1, 2))
            if not changed.any():
                break
            active, better = active[changed], better[changed]
            after = self.sums(better)
            reached = self.value(after)
            rose = reached > values[active] * (1 + 1e-12)
            active = active[rose]
            if not len(active):
                break
            choices[active], sums[active], values[active] = better[rose], after[rose], reached[rose]
        return choices, values

    def polish(self, choice: Array) -> Array:
        """One donor after another, each against the sums of the others, until none moves."""
        choice, sums = choice.copy(), self.sums(choice[None])[0]
        for _ in range(POLISHES):
            moved = 0
            for d, menu in enumerate(self.zoo.menus):
                own = self.rows[self.at[d, :, : menu.size]].astype(np.float64)
                mine = own[self.places[0], choice[d]]
                others = sums - mine
                worth = np.einsum("jsm,jm->js", own, others) - self.dislike[d, :, : menu.size]
                better = best_path(worth[None], self.windows.barrier[d, None, :, : menu.size, : menu.size])[0]
                if (better != choice[d]).any():
                    moved += 1
                    sums, choice[d] = others + own[self.places[0], better], better
            if not moved:
                break
        return choice


def search(zoo: Zoo, starts: int, seed: int) -> Array:
    """Best choice found, (donors, places): sweeps from a few starts, perturbation of the best, then donor by donor."""
    if zoo.places == 0:
        return np.zeros((len(zoo.menus), 0), np.int64)
    random, sketch = np.random.default_rng(seed), Sketch(zoo)
    starts = min(starts, STARTS[1], max(CHOSEN // len(zoo.menus), STARTS[0]))
    choices, values = sketch.climb(_initial(zoo, starts, random))
    best, value = choices[values.argmax()], values.max()
    for _ in range(SHAKES):
        redraw = random.random((starts, len(zoo.menus), 1)) < SHAKE
        choices, values = sketch.climb(np.where(redraw, drawn(zoo, starts, random), best))
        if values.max() > value * (1 + 1e-12):
            best, value = choices[values.argmax()], values.max()
    return cut_numbers(zoo, sketch.polish(best))


def _initial(zoo: Zoo, starts: int, random: np.random.Generator) -> Array:
    """Cuts near equal shares, alignment to donors spread over the zoo, and random cuts."""
    quantile = near_quantiles(zoo)
    leaders = np.unique(np.linspace(0, len(zoo.menus) - 1, min(starts // 2, len(zoo.menus))).astype(int))
    rows = [quantile[None], *(aligned(zoo, int(d), quantile[d])[None] for d in leaders)]
    return np.concatenate([*rows, drawn(zoo, max(starts - 1 - len(leaders), 0), random)])
