"""Synthetic zoos for the benchmarks of the search: donors whose features drift smoothly from input to output.

All donors see the same probes. A donor's features at a cut are what all share, at that depth (smooth random factors,
at a pace of the donor's own) and throughout, what is the donor's own (smooth too), and noise that neighbouring cuts do
not share. The similarity of two cuts is the cosine of their U-centred Gram matrices: debiased linear CKA, unclipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from derc.artifacts import Array
from derc.equivalence import Zoo, make_menu

PROBES = 64
FACTORS = 24
COMMON, OWN, NOISE = 0.5, 0.7, 0.25
DEPTHS = (10, 60)


@dataclass(frozen=True)
class Synthetic:
    """Every donor's number of units' MACs and the rows (cuts, size), float32 of length 1, of all cuts in order."""

    macs: tuple[Array, ...]
    rows: Array

    @property
    def cuts(self) -> int:
        return len(self.rows)

    def zoo(self, blocks: int = 4, epsilon: float = 0.2, *, sketched: bool) -> Zoo:
        """As the search wants it, with rows or with all similarities (clipped to [0, 1], as derc's are)."""
        menus, start = [], 0
        for number, macs in enumerate(self.macs):
            before = np.concatenate([[0], np.cumsum(macs)])
            width = np.linspace(1, 0.3, len(before))
            menus.append(make_menu(f"d{number}", start, before, width, blocks, epsilon))
            start += len(before)
        if sketched:
            return Zoo(tuple(menus), np.zeros((0, 0)), blocks, self.rows)
        wide = self.rows.astype(np.float64)
        alike = np.clip(wide @ wide.T, 0, 1)
        np.fill_diagonal(alike, 1)
        return Zoo(tuple(menus), (alike + alike.T) / 2, blocks)


def synthetic(donors: int, seed: int, size: int | None = None) -> Synthetic:
    """A zoo of so many donors of 10 to 60 units; rows are projected at random to `size` numbers, None: kept whole.

    The zoo of a seed is the same, projected or not.
    """
    random = np.random.default_rng(seed)
    shared = random.standard_normal((FACTORS, PROBES, 6))
    length = PROBES * (PROBES - 1) // 2
    coins = np.random.default_rng((seed, 1))
    signs = None if size is None else (coins.integers(0, 2, (length, size)) * 2 - 1).astype(np.float32)
    depths = random.integers(DEPTHS[0], DEPTHS[1] + 1, donors)
    rows = np.empty((int((depths + 1).sum()), length if size is None else size), np.float32)
    start, macs = 0, []
    for depth in depths:
        macs.append(np.round(1e6 * random.lognormal(0, 0.4, depth)))
        vectors = _donor(macs[-1], shared, random)
        rows[start : start + depth + 1] = vectors if signs is None else vectors @ signs
        start += depth + 1
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Synthetic(tuple(macs), rows)


def _donor(macs: Array, shared: Array, random: np.random.Generator) -> Array:
    """(cuts, pairs of probes): the cuts' U-centred Gram matrices as vectors."""
    share = np.concatenate([[0], np.cumsum(macs)]) / macs.sum()
    pace = share ** np.exp(random.normal(0, 0.25))
    own = random.standard_normal((5, PROBES, 6))
    noise = random.standard_normal((len(share), PROBES, 6))
    blend = (
        _mix(pace, shared[1:])
        + COMMON * shared[0]
        + OWN * np.sqrt(share)[:, None, None] * _mix(share, own)
        + NOISE * noise
    )
    blend -= blend.mean(axis=1, keepdims=True)
    grams = blend @ blend.transpose(0, 2, 1)
    return _u_vectors(grams)


def _mix(place: Array, factors: Array) -> Array:
    """Features at places in [0, 1] of a path that leads smoothly from factor to factor."""
    knots = np.linspace(0, 1, len(factors))
    weight = np.exp(-0.5 * ((place[:, None] - knots[None, :]) / 0.2) ** 2)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    mixed: Array = np.einsum("cf,fnp->cnp", weight, factors)
    return mixed


def _u_vectors(grams: Array) -> Array:
    n = grams.shape[1]
    grams[:, np.arange(n), np.arange(n)] = 0
    means = grams.sum(axis=1) / (n - 2)
    shift = means.sum(axis=1) / (n - 1)
    grams = grams - means[:, :, None] - means[:, None, :] + shift[:, None, None]
    upper = np.triu_indices(n, 1)
    vectors: Array = grams[:, upper[0], upper[1]].astype(np.float32)
    return vectors
