"""What a partition is worth beside its objective: how sure its cuts are, and how distinct its sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from derc.artifacts import Array, EmbeddedZoo
from derc.equivalence import Zoo, best_with
from derc.streaming import unit_rows

NEAR = 1e-4
"""Share of the objective up to which another cut is as good: less than what the choice of probe images makes."""


@dataclass(frozen=True)
class Other:
    """Donor number `donor` may cut at `other` in place of `cut` at a place, for `loss`, a share of the objective."""

    donor: int
    place: int
    cut: int
    other: int
    loss: float


def half_zoos(zoo: Zoo, embedded: EmbeddedZoo, rows: Sequence[int]) -> tuple[Zoo, ...]:
    """The same zoo by the similarity over either half of the probe set; none where that is not known.

    `rows` are the zoo's cuts in the index of the similarity.
    """
    if zoo.rows is not None:
        middle = zoo.rows.shape[1] // 2
        return tuple(replace(zoo, rows=unit_rows(part)) for part in (zoo.rows[:, :middle], zoo.rows[:, middle:]))
    if embedded.halves is None:
        return ()
    halves = [half[np.ix_(rows, rows)].astype(np.float64) for half in embedded.halves]
    return tuple(replace(zoo, similarity=(half + half.T) / 2) for half in halves)


def moved(cuts: Array, others: Sequence[Array]) -> float | None:
    """Share of the cuts (donors, places) that lie elsewhere in some of the `others`; None without any."""
    return float(np.any([other != cuts for other in others], axis=0).mean()) if others and cuts.size else None


def near_ties(zoo: Zoo, cuts: Array, others: Sequence[Array]) -> tuple[Other, ...]:
    """Cuts that lie elsewhere in some of the `others` although that costs less than NEAR of the objective.

    The cost is that of the donor's best partition with the other cut, all other donors' cuts as they are.
    """
    if not others or not cuts.size:
        return ()
    total, found = float(zoo.objective(cuts[None])[0]), dict[tuple[int, int, int], Other]()
    worth = _worth(zoo, cuts)
    reach = best_with(worth, zoo.windows.barrier)
    best = reach.max(axis=(1, 2))
    for other in others:
        for donor, place in zip(*map(np.ndarray.tolist, np.nonzero(other != cuts)), strict=True):
            cut, instead = int(cuts[donor, place]), int(other[donor, place])
            lost = 2 * (best[donor] - reach[donor, place, instead - zoo.menus[donor].low[place]])
            loss = max(float(lost), 0.0) / max(abs(total), 1e-12)
            if loss < NEAR:
                found[donor, place, instead] = Other(donor, place, cut, instead, loss)
    return tuple(found[key] for key in sorted(found))


def _worth(zoo: Zoo, cuts: Array) -> Array:
    """(donors, places, size): how like each cut of the windows is to the other donors' chosen cuts."""
    windows = zoo.starts[:, None, None] + zoo.windows.cut
    chosen = zoo.starts[:, None] + cuts
    worth = np.zeros(windows.shape)
    if zoo.rows is not None:
        sums = zoo.rows[chosen].sum(axis=0, dtype=np.float64)
        for window, mine, found in zip(windows, chosen, worth, strict=True):
            found += np.einsum("jsm,jm->js", zoo.rows[window].astype(np.float64), sums - zoo.rows[mine])
    else:
        for d, mine in enumerate(chosen):
            alike = zoo.similarity[mine[None, :, None], windows]
            alike[d] = 0
            worth += alike
    worth[~np.isfinite(zoo.windows.dislike)] = -np.inf
    return worth


def distinctness(zoo: Zoo, cuts: Array) -> float:
    """The smallest share, over the equivalence sets, of blocks that are where they belong, in [0, 1].

    A block's likeness to a set is its summed S with the other donors' blocks there. It belongs where it is if it could
    change places with none of its donor's other blocks so that their likeness, summed, would rise. (Early values are
    more like everything than late ones, so that merely asking for each block's most like set would favour the first.)
    The share is a measure of a clustering's validity after the prediction strength of Tibshirani and Walther (2005).
    """
    ends = np.array([len(menu.width) - 1 for menu in zoo.menus])
    rows = zoo.starts[:, None] + np.column_stack([np.zeros_like(ends), cuts, ends])
    totals = zoo.totals(rows)
    like = (totals[:-1, :, :-1] + totals[1:, :, 1:]).transpose(1, 0, 2)
    own = np.diagonal(like, axis1=1, axis2=2)
    stays = own[:, :, None] + own[:, None, :] >= like + like.transpose(0, 2, 1) - 1e-9
    return float(stays.all(axis=2).mean(axis=0).min())
