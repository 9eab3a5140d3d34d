"""Linear classifiers on frozen features in closed form: ridge regression to one-hot targets, or logistic regression.

Everything is float64. What is chosen is chosen by images that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from derc import logistic
from derc.artifacts import Array

Rows = Callable[[], Iterable[tuple[Array, Array]]]
"""Gives, as often as it is called, the same batches: features (n, d) float64 and class indices (n,)."""
STRENGTHS = tuple(10.0**power for power in range(-6, 3))
"""Ridge penalties tried, as shares of the mean squared feature."""
FOLDS = 5


@dataclass(frozen=True)
class Linear:
    """logits = x @ weight + bias, weight (d, classes); `left_out` are the logits of rows that no fit had seen.

    `strength` is the penalty as a share of the mean squared feature. `left_out` is in the order of the rows.
    """

    method: str
    strength: float
    weight: Array
    bias: Array
    left_out: Array

    def accuracy(self, labels: Array) -> float:
        """Share of rows that were answered right when they were left out."""
        return float((self.left_out.argmax(1) == labels).mean())


@dataclass(frozen=True)
class Axes:
    """Principal axes (d, r) of centred features, their squared singular values (r,), and axesᵀXᵀY (r, classes)."""

    count: int
    mean: Array
    targets: Array
    axes: Array
    squares: Array
    cross: Array

    @property
    def unit(self) -> float:
        """The mean squared feature, summed over rows."""
        return max(float(self.squares.sum()) / len(self.mean), 1e-300)


def fit(x: Array, labels: Array, classes: int, strengths: tuple[float, ...] = logistic.STRENGTHS) -> Linear:
    """The better of ridge and logistic regression for features x (n, d), by how many left-out rows each gets right.

    Of equals ridge regression. Every class needs two rows. `strengths` are those that logistic regression may have,
    strongest first; with none there is only ridge regression.
    """
    parts = folds(labels)
    found = ridge(lambda: ((x[part], labels[part]) for part in parts), classes)
    first = replace(found, left_out=found.left_out[np.argsort(np.concatenate(parts))])
    if not strengths:
        return first
    strength, weight, bias, left_out = logistic.Logistic(classes, strengths).fit(x, labels, parts)
    second = Linear("logistic", strength, weight, bias, left_out)
    return second if second.accuracy(labels) > first.accuracy(labels) else first


def folds(labels: Array, count: int = FOLDS) -> list[Array]:
    """Indices in `count` parts, each class in even shares; a class of two rows or more is in two parts at least."""
    place = np.empty(len(labels), np.int64)
    start = 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = (start + np.arange(len(members))) % count
        start += len(members)
    return [part for part in (np.flatnonzero(place == number) for number in range(count)) if len(part)]


def ridge(rows: Rows, classes: int) -> Linear:
    """Ridge regression to one-hot targets; the penalty has the least squared error on batches that are left out.

    Leaving a batch B out has a closed form: its residual becomes (I − H_BB)⁻¹ r_B, with H the matrix that maps targets
    to fitted values (Allen 1974 for single rows). The logits are scaled so that the left-out ones have the least log
    loss, for one-hot regression says nothing of their scale. The bias is not penalised. Three passes over `rows`.
    """
    axes = principal(rows, classes)
    errors = np.zeros(len(STRENGTHS))
    for x, labels in rows():
        errors += [np.square(_left_out(axes, x, labels, strength)[1]).sum() for strength in STRENGTHS]
    strength = STRENGTHS[int(errors.argmin())]
    found = [(_left_out(axes, x, labels, strength)[0], labels) for x, labels in rows()]
    predicted, labels = np.concatenate([p for p, _ in found]), np.concatenate([y for _, y in found])
    scale = temperature(predicted, labels)
    weight = axes.axes @ (axes.cross / (axes.squares + strength * axes.unit)[:, None])
    return Linear("ridge", strength, scale * weight, scale * (axes.targets - axes.mean @ weight), scale * predicted)


def _left_out(axes: Axes, x: Array, labels: Array, strength: float) -> tuple[Array, Array]:
    """What a fit without these rows predicts for them, and the residual."""
    targets = np.eye(len(axes.targets))[labels]
    z = (x - axes.mean) @ axes.axes
    shrink = 1 / (axes.squares + strength * axes.unit)
    residual = targets - axes.targets - z @ (shrink[:, None] * axes.cross)
    hat = (z * shrink) @ z.T + 1 / axes.count
    # Where rows outnumber nothing, a fit through every row leaves no residual and H_BB is the identity up to rounding.
    left = np.linalg.solve((1 + 1e-9) * np.eye(len(x)) - hat, residual)
    return targets - left, left


def principal(rows: Rows, classes: int) -> Axes:
    """The axes of all rows, in one pass with d × d sums, or by the rows themselves where they are fewer than d."""
    first = next(iter(rows()))[0]
    shift, width = first.mean(0), first.shape[1]
    kept: list[Array] = []
    count, x_sum, y_sum = 0, np.zeros(width), np.zeros(classes)
    xy = np.zeros((width, classes))
    xx: Array | None = None
    for x, labels in rows():
        x, y = x - shift, np.eye(classes)[labels]
        count, x_sum, y_sum = count + len(x), x_sum + x.sum(0), y_sum + y.sum(0)
        xy += x.T @ y
        kept.append(x)
        if xx is None and count > width:
            xx = np.zeros((width, width))
        if xx is not None:
            xx += sum(part.T @ part for part in kept)
            kept = []
    mean, targets = x_sum / count, y_sum / count
    cross = xy - count * np.outer(mean, targets)
    if xx is None:
        _, s, vt = np.linalg.svd(np.concatenate(kept) - mean, full_matrices=False)
        squares, axes = s**2, vt.T
    else:
        squares, axes = np.linalg.eigh(xx - count * np.outer(mean, mean))
    return Axes(count, mean + shift, targets, axes, squares.clip(0), axes.T @ cross)


def temperature(logits: Array, labels: Array) -> float:
    """The factor of (n, classes) logits with the least log loss, as if one of the n labels were any class.

    Without that, logits that are right everywhere would have no best factor. The loss is convex in it, so the root of
    its derivative is found by halving, between 0.001 and 1000.
    """
    own = logits[np.arange(len(labels)), labels] * (1 - 1 / len(labels)) + logits.mean(1) / len(labels)
    low, high = -3.0, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        scaled = 10**middle * logits
        chance = np.exp(scaled - scaled.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        slope = float(((chance * logits).sum(1) - own).mean())
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(10 ** ((low + high) / 2))
