"""A Bayesian model of what whole networks lose, additive over a path's edges: posterior mean and posterior draws.

The loss of an assembly is the sum over its edges of what is believed beforehand and of a correction that is linear in
features, each with a normal prior of mean zero: numbers that describe an edge, and indicators of the donor, the block,
the pair of donors and the pair of blocks. Features of one group share a standard deviation, a multiple of one scale.
Scale, multiples and noise have the largest marginal likelihood times a broad prior (Rasmussen & Williams 2006, eq. 2.30
and 5.8). Both mean and draws are one number per edge, so a selection under either is solved exactly (Thompson 1933).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc.artifacts import Array

NOISE = "noise"
"""The name of the group of what no feature explains: one number for each assembly."""
SCALE = 0.1
"""Prior guess of the scale, and how many observations it counts as."""
SCALE_WEIGHT = 0.1
BREADTH = 1.0
"""Standard deviation of the prior of a multiple's logarithm."""
STEPS = (-1.0, -0.5, 0.5, 1.0)
"""Changes of a multiple's logarithm that are tried, one multiple after another."""
SWEEPS = 6
LEAST_GAIN = 1e-6
"""A change that gains less in log likelihood is none, so that the order of sums does not decide."""
DIGITS = 12
"""Decimals, in units of the scale, that losses are rounded to, so that the order of sums does not matter."""


@dataclass(frozen=True)
class Group:
    """Features of edges with one prior standard deviation, `spread` in units of the scale before anything is known.

    That of `fixed` features is in units of the losses and stays: what they explain does not bear on the scale. Either
    `values` (edges, features) are numbers, or `keys` (edges,) number indicators, −1 where an edge has none.
    """

    name: str
    spread: float
    values: Array | None = None
    keys: Array | None = None
    fixed: bool = False

    @cached_property
    def size(self) -> int:
        """How many features there are."""
        if self.values is not None:
            return int(self.values.shape[1])
        return int(self.keys.max(initial=-1)) + 1 if self.keys is not None else 0

    def sums(self, paths: Sequence[tuple[int, ...]]) -> Array:
        """(paths, features): each path's sums over its edges."""
        found = np.zeros((len(paths), self.size))
        for row, path in enumerate(paths):
            places = list(path)
            if self.values is not None:
                found[row] = self.values[places].sum(axis=0)
            elif self.keys is not None:
                keys = self.keys[places]
                np.add.at(found[row], keys[keys >= 0], 1.0)
        return found

    def spend(self, weights: Array) -> Array:
        """(edges,): what features of these weights give each edge."""
        if self.values is not None:
            dense: Array = self.values @ weights
            return dense
        keys = np.zeros(0, int) if self.keys is None else self.keys
        given: Array = np.append(weights, 0.0)[keys]
        return given


def indicators(name: str, spread: float, keys: Sequence[Hashable | None]) -> Group:
    """A group with one feature for each distinct key; None is an edge without any."""
    number: dict[Hashable, int] = {}
    numbers = [-1 if key is None else number.setdefault(key, len(number)) for key in keys]
    return Group(name, spread, keys=np.array(numbers, int))


@dataclass(frozen=True)
class Surrogate:
    """What is believed after seeing `values`, the losses of the networks `paths`; `prior` (edges,) is the mean before.

    `spreads` are the standard deviations of the groups, and of the noise, in the units of the losses.
    """

    groups: tuple[Group, ...]
    prior: Array
    paths: tuple[tuple[int, ...], ...]
    values: Array
    spreads: Mapping[str, float]

    @cached_property
    def mean(self) -> Array:
        """(edges,): the posterior mean of each edge's loss."""
        return self._given(self.prior, self._residual, {})

    def draw(self, random: np.random.Generator) -> Array:
        """(edges,): the losses of all edges in one draw from the posterior (Matheron's rule)."""
        weights = {group.name: self.spreads[group.name] * random.standard_normal(group.size) for group in self.groups}
        residual = self._residual - self.spreads[NOISE] * random.standard_normal(len(self.paths))
        for group in self.groups:
            residual = residual - self._sums[group.name] @ weights[group.name]
        return self._given(self.prior, residual, weights)

    def deviation(self, path: tuple[int, ...]) -> float:
        """The posterior standard deviation of one network's sum, without noise."""
        variance, cross = 0.0, np.zeros(len(self.paths))
        for group in self.groups:
            mine = group.sums([path])[0]
            variance += self.spreads[group.name] ** 2 * float(mine @ mine)
            cross += self.spreads[group.name] ** 2 * (self._sums[group.name] @ mine)
        half = _lower_solve(self._root, cross)
        return float(np.sqrt(max(variance - float(half @ half), 0.0)))

    def _given(self, prior: Array, residual: Array, weights: Mapping[str, Array]) -> Array:
        """Edges' losses of prior `weights` (none: zero), moved to explain `residual`."""
        loss = prior.copy()
        alpha = _solve(self._root, residual)
        for group in self.groups:
            moved = self.spreads[group.name] ** 2 * (self._sums[group.name].T @ alpha)
            loss += group.spend(moved + weights.get(group.name, 0.0))
        unit = max(float(np.abs(loss).max(initial=0.0)), 1e-300)
        rounded: Array = np.round(loss / unit, DIGITS) * unit
        return rounded

    @cached_property
    def _residual(self) -> Array:
        return _residual(self.prior, self.paths, self.values)

    @cached_property
    def _sums(self) -> dict[str, Array]:
        return {group.name: group.sums(self.paths) for group in self.groups}

    @cached_property
    def _root(self) -> Array:
        kernels = {group.name: self._sums[group.name] @ self._sums[group.name].T for group in self.groups}
        return _root(kernels, self.spreads, len(self.paths))


def fit(
    groups: tuple[Group, ...],
    prior: Array,
    paths: Sequence[tuple[int, ...]],
    values: Array,
    noise: float,
    telling: Sequence[bool] | None = None,
) -> Surrogate:
    """The model with the best scale, multiples and noise for networks `paths` of losses `values`.

    `noise` is the noise's spread in units of the scale before anything is known. Networks that are not `telling` (None:
    all are) do not decide on scale and multiples, as those whose losses the prior was made from.
    """
    rows = [row for row in range(len(paths)) if telling is None or telling[row]]
    seen = [paths[row] for row in rows]
    free, basis = [group for group in groups if not group.fixed], _unexplained(groups, seen)
    residual = basis.T @ _residual(prior, paths, values)[rows]
    kernels = {group.name: _product(basis.T @ group.sums(seen)) for group in free}
    start = {**{group.name: group.spread for group in free}, NOISE: noise}
    multiples = _times(start, _climb(kernels, start, residual))
    scale = _scale_of(_root(kernels, multiples, len(residual)), residual)
    spreads = {name: scale * one for name, one in multiples.items()}
    return Surrogate(
        groups, prior, tuple(paths), values, spreads | {group.name: group.spread for group in groups if group.fixed}
    )


def _unexplained(groups: tuple[Group, ...], paths: Sequence[tuple[int, ...]]) -> Array:
    """Orthonormal columns that span what fixed groups cannot explain of the paths' losses (restricted likelihood)."""
    fixed = [group.sums(paths) for group in groups if group.fixed]
    if not fixed:
        return np.eye(len(paths))
    columns = np.concatenate(fixed, axis=1)
    basis: Array = np.linalg.qr(columns, mode="complete")[0][:, columns.shape[1] :]
    return basis


def _climb(kernels: Mapping[str, Array], start: Mapping[str, float], residual: Array) -> dict[str, float]:
    """The best logarithms of the multiples, one changed after another until none improves."""
    logs = dict.fromkeys(start, 0.0)
    best = _evidence(kernels, start, residual, logs)
    for _ in range(SWEEPS if len(residual) else 0):
        before = best
        for name in start:
            tried = [{**logs, name: logs[name] + step} for step in STEPS]
            scored = [(_evidence(kernels, _times(start, one), residual, one), one) for one in tried]
            found, other = max(scored, key=lambda pair: pair[0])
            if found > best + LEAST_GAIN:
                best, logs = found, other
        if best == before:
            break
    return logs


def _times(start: Mapping[str, float], logs: Mapping[str, float]) -> dict[str, float]:
    return {name: spread * float(np.exp(logs[name])) for name, spread in start.items()}


def _residual(prior: Array, paths: Sequence[tuple[int, ...]], values: Array) -> Array:
    return np.array([value - prior[list(path)].sum() for path, value in zip(paths, values, strict=True)])


def _product(sums: Array) -> Array:
    found: Array = sums @ sums.T
    return found


def _root(kernels: Mapping[str, Array], spreads: Mapping[str, float], count: int) -> Array:
    """Lower Cholesky factor of the covariance of `count` values."""
    total = spreads[NOISE] ** 2 * np.eye(count)
    for name, kernel in kernels.items():
        total = total + spreads[name] ** 2 * kernel
    found: Array = np.linalg.cholesky(total + 1e-10 * np.trace(total) / max(count, 1) * np.eye(count))
    return found


def _evidence(
    kernels: Mapping[str, Array], multiples: Mapping[str, float], residual: Array, logs: Mapping[str, float]
) -> float:
    """Log of the marginal likelihood times the priors, the best scale put in, up to a constant."""
    root = _root(kernels, multiples, len(residual))
    scale = _scale_of(root, residual)
    count = len(residual) + SCALE_WEIGHT
    prior = sum((value / BREADTH) ** 2 for value in logs.values()) / 2
    return float(-count * np.log(scale) - np.log(np.diag(root)).sum() - prior)


def _scale_of(root: Array, residual: Array) -> float:
    """The most likely scale; SCALE counts as SCALE_WEIGHT observations."""
    half = _lower_solve(root, residual)
    return float(np.sqrt((half @ half + SCALE_WEIGHT * SCALE**2) / (len(residual) + SCALE_WEIGHT)))


def _solve(root: Array, right: Array) -> Array:
    """x of (root rootᵀ) x = right."""
    half = _lower_solve(root, right)
    found: Array = np.linalg.solve(root.T, half)
    return found


def _lower_solve(root: Array, right: Array) -> Array:
    found: Array = np.linalg.solve(root, right)
    return found
