"""Random graphs of steps, and their answers by enumerating every path."""

from __future__ import annotations

import numpy as np

from derc.artifacts import Array
from derc.dag import Dag, Limits
from derc.enumeration import Found


def random_dag(seed: int, layers: int = 3, width: int = 5, resources: int = 2, skip: float = 0.1) -> Dag:
    """Blocks in layers; some steps are missing, a few skip a layer, and cheap steps take more."""
    random = np.random.default_rng(seed)
    level = np.concatenate([[0], np.repeat(np.arange(1, layers + 1), width), [layers + 1]])
    tail, head = np.nonzero(level[:, None] < level[None, :])
    gap = level[head] - level[tail]
    keep = random.random(len(tail)) < np.where(gap == 1, 0.9, skip)
    tail, head = tail[keep], head[keep]
    amounts = random.uniform(0, 1, (resources, len(tail)))
    cost = random.normal(0, 0.3, len(tail)) - 0.5 * amounts.sum(axis=0)
    return Dag(level, tail, head, cost, amounts, random.uniform(0, 1, len(tail)), np.arange(len(tail)))


def every_path(dag: Dag) -> list[list[int]]:
    """Edges of all paths from source to sink, by recursion over the edge list."""

    def grow(node: int) -> list[list[int]]:
        if node == dag.nodes - 1:
            return [[]]
        leaving = np.flatnonzero(dag.tail == node)
        return [[int(edge), *rest] for edge in leaving for rest in grow(int(dag.head[edge]))]

    return grow(0)


def within(dag: Dag, limits: Limits, path: list[int]) -> bool:
    total = dag.amounts[:, path].sum(axis=1)
    if limits.peaked >= 0:
        total[limits.peaked] += dag.peak[path].max()
    return bool((total >= limits.low).all() and (total <= limits.high).all())


def brute_force(dag: Dag, limits: Limits) -> list[float]:
    """Costs of all paths within the limits, cheapest first."""
    return sorted(float(dag.cost[path].sum()) for path in every_path(dag) if within(dag, limits, path))


def random_limits(dag: Dag, seed: int, *, two_sided: bool, peaked: bool) -> Limits:
    """Limits at random quantiles of what paths take; a lower one for some resources, never for the peaked one."""
    random = np.random.default_rng(seed + 1)
    paths = every_path(dag)
    totals = np.array([dag.amounts[:, path].sum(axis=1) for path in paths]).reshape(len(paths), len(dag.amounts))
    which = 0 if peaked else -1
    if peaked and len(paths):
        totals[:, 0] += [dag.peak[path].max() for path in paths]
    lower, upper = np.full(totals.shape[1], -np.inf), np.full(totals.shape[1], np.inf)
    for row in range(totals.shape[1] if len(paths) else 0):
        low, high = np.sort(random.uniform(0, 1, 2))
        upper[row] = np.quantile(totals[:, row], high)
        if two_sided and row != which and random.random() < 0.7:
            lower[row] = np.quantile(totals[:, row], low * high)
    return Limits(lower, upper, which)


def costs_of(dag: Dag, found: Found) -> Array:
    """Costs of the paths found, added up afresh."""
    return np.array([dag.cost[row[row >= 0]].sum() for row in found.edges])
