"""Random problems with many candidates for each of a few positions."""

from __future__ import annotations

import itertools

import numpy as np

from derc.dag import Limits
from derc.wide import Pairs, Wide


def random_wide(seed: int, sizes: tuple[int, ...], *, types: int = 4, rank: int = 3, dense: bool = False) -> Wide:
    """Larger candidates cost less; a stitch costs what its types say and how unlike its ends are."""
    random = np.random.default_rng(seed)
    cost, amounts, pairs = [], [], []
    for count in sizes:
        size = np.exp(random.normal(0, 0.5, count))
        amounts.append(np.stack([size * np.exp(random.normal(0, 0.3, count)) for _ in range(2)]))
        cost.append(0.5 - 0.3 * np.log(size) + random.normal(0, 0.1, count))
    for rows, columns in itertools.pairwise(sizes):
        left, right = (random.normal(size=(n, rank)) for n in (rows, columns))
        left, right = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (left, right))
        table = random.uniform(0, 0.2, (3, types, types))
        given = random.uniform(0, 0.5, (rows, columns)).astype(np.float32) if dense else None
        kinds = random.integers(0, types, rows), random.integers(0, types, columns)
        pairs.append(Pairs((-left).astype(np.float32), right.astype(np.float32), *kinds, table, given))
    return Wide(tuple(cost), tuple(amounts), tuple(pairs))


def totals(wide: Wide, path: tuple[int, ...]) -> tuple[float, np.ndarray]:
    """Cost and amounts of one path, added up from the definition in float64."""
    cost = sum(float(c[i]) for c, i in zip(wide.cost, path, strict=True))
    amounts = sum(a[:, i] for a, i in zip(wide.amounts, path, strict=True))
    for pairs, (i, j) in zip(wide.pairs, itertools.pairwise(path), strict=True):
        typed = pairs.table[:, pairs.gives[i], pairs.takes[j]]
        cost += float(pairs.left[i].astype(float) @ pairs.right[j].astype(float)) + typed[0]
        cost += 0.0 if pairs.dense is None else float(pairs.dense[i, j])
        amounts = amounts + typed[1:]
    return cost, amounts


def brute_force(wide: Wide, limits: Limits) -> list[float]:
    """Costs of all paths within the limits, cheapest first."""
    every = [totals(wide, path) for path in itertools.product(*(range(len(c)) for c in wide.cost))]
    return sorted(c for c, a in every if (a >= limits.low).all() and (a <= limits.high).all())


def two_sided(wide: Wide, low: float, high: float) -> Limits:
    """Limits at these multiples of what median candidates take together."""
    middle = np.sum([np.median(a, axis=1) for a in wide.amounts], axis=0)
    return Limits(low * middle, high * middle)
