"""How alike two values are over the probe set: every estimator as one product of flattened matrices.

An estimator turns a value's features (n, p) into two vectors, `left` and `right`; the products left · rightᵀ of all
values give all similarities at once. For the three kinds of CKA both are the centred Gram matrix, and the product is
normalised by its own diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt

import numpy as np
import torch

from derc.artifacts import Array
from derc.errors import UsageError, suggest

ESTIMATORS = {
    "cka": "linear CKA",
    "cka-debiased": "linear CKA, debiased",
    "rbf": "RBF CKA",
    "r2": "linear regression R²",
}
LEAST_IMAGES = 4
"""The debiased estimators need as many."""
BANDWIDTH = 0.5
"""Width of the RBF kernel as a share of the median distance between two images (Kornblith et al. 2019, section 6)."""
CHUNK = 1 << 16
"""Columns that are multiplied in float32 before the sum goes on in float64."""


@dataclass(frozen=True)
class Flat:
    """One value's rows of the product; `right` is None where it equals `left`."""

    left: Array
    right: Array | None = None


def check(estimator: str) -> None:
    """Raise UsageError unless there is such an estimator."""
    if estimator not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise UsageError(f"unknown similarity {estimator!r}, known: {known}{suggest(estimator, ESTIMATORS)}")


def kernel(values: Array, estimator: str) -> Array:
    """The (n, n) kernel matrix of features (n, p), float32: linear on centred features, or RBF.

    The RBF kernel's width is BANDWIDTH times the median distance of two different images.
    """
    centred = (values - values.mean(axis=0, dtype=np.float64)).astype(np.float32)
    linear: Array = centred @ centred.T
    return _rbf(linear.astype(np.float64)) if estimator == "rbf" else linear


def _rbf(linear: Array) -> Array:
    norms = np.diag(linear)
    squared = np.maximum(norms[:, None] + norms[None, :] - 2 * linear, 0)
    median = np.median(squared[np.triu_indices(len(squared), 1)])
    width = BANDWIDTH**2 * median if median > 0 else 1.0
    found: Array = np.exp(-squared / (2 * width)).astype(np.float32)
    return found


def flatten(gram: Array, estimator: str) -> Flat:
    """A kernel matrix as vectors; raises UsageError for fewer than 4 images where the estimator is debiased."""
    if estimator == "r2":
        return _regression(centre(gram).astype(np.float64))
    centred = u_centre(gram) if estimator == "cka-debiased" else centre(gram)
    return Flat(half(centred, float(np.linalg.norm(centred))))


def centre(gram: Array) -> Array:
    """HKH (Kornblith et al. 2019, eq. 3), the means taken in float64."""
    means = gram.mean(axis=0, dtype=np.float64)
    centred: Array = gram - (means[:, None] + (means[None, :] - means.mean())).astype(gram.dtype)
    return centred


def u_centre(gram: Array) -> Array:
    """U-centred with a zero diagonal, so that products are unbiased HSIC times n (n − 3) (Song et al. 2012, eq. 5)."""
    n = len(gram)
    if n < LEAST_IMAGES:
        raise UsageError(f"a debiased similarity needs at least {LEAST_IMAGES} images, not {n}: give more to --probe")
    centred = gram.copy()
    np.fill_diagonal(centred, 0)
    rows = centred.sum(axis=0, dtype=np.float64) / (n - 2)
    shift = rows.sum() / (n - 1)
    centred -= (rows[:, None] + (rows[None, :] - shift)).astype(gram.dtype)
    np.fill_diagonal(centred, 0)
    return centred


def half(symmetric: Array, scale: float) -> Array:
    """The upper triangle over `scale`, float32, off-diagonals times √2: inner products are those of the whole."""
    n = len(symmetric)
    vector: Array = symmetric.ravel().take(_upper(n)).astype(np.float32)
    vector *= np.float32(sqrt(2) / scale) if scale > 0 else np.float32(0)
    vector[_diagonal(n)] *= np.float32(sqrt(0.5))
    return vector


@cache
def _upper(n: int) -> Array:
    rows, columns = np.triu_indices(n)
    return rows * n + columns


@cache
def _diagonal(n: int) -> Array:
    return np.concatenate([[0], np.cumsum(np.arange(n, 1, -1))])


def _regression(gram: Array) -> Flat:
    """`left`: what a ridge regression on this value explains of each direction of the images; `right`: the value.

    With hat matrix H = K (K + λI)⁻¹ the explained share is I − (I − H)²; λ is K's mean eigenvalue, so that directions
    weaker than the average count for little. It is R² in sample: noise of more features than images explains all.
    """
    n = len(gram)
    ridge = float(np.trace(gram)) / n
    if ridge <= 0:
        return Flat(half(gram, 1), half(gram, 1))
    factor = torch.linalg.cholesky(torch.from_numpy(gram) + ridge * torch.eye(n, dtype=torch.float64))
    rest = ridge * torch.cholesky_inverse(factor).numpy()
    return Flat(half(np.eye(n) - rest @ rest, sqrt(n)), half(gram, float(np.linalg.norm(gram))))


class Products:
    """Collects values one by one, then gives all their similarities; their vectors are kept, in float32."""

    def __init__(self, count: int, images: int, estimator: str) -> None:
        shape = count, images * (images + 1) // 2
        self.left = np.zeros(shape, np.float32)
        self.right = np.zeros(shape, np.float32) if estimator == "r2" else self.left
        self.filled = 0

    def add(self, flat: Flat) -> None:
        self.left[self.filled] = flat.left
        if flat.right is not None:
            self.right[self.filled] = flat.right
        self.filled += 1

    def similarity(self) -> Array:
        """(count, count) float64 in [0, 1]; a value that is the same for every image is like nothing but itself."""
        products = product(self.left, self.right)
        return cosines(products) if self.right is self.left else explained(products)


def product(left: Array, right: Array) -> Array:
    """left · rightᵀ, in float32 over CHUNK columns at a time, summed in float64."""
    total = np.zeros((len(left), len(right)))
    for start in range(0, left.shape[1], CHUNK):
        part = left[:, start : start + CHUNK]
        other = part if right is left else right[:, start : start + CHUNK]
        total += part @ other.T
    return total


def cosines(products: Array) -> Array:
    """Symmetric products divided by the roots of their own diagonal, in [0, 1]."""
    diagonal = np.diag(products)
    scale = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1)), 0)
    return _proper(products * (scale[:, None] * scale[None, :]))


def explained(products: Array) -> Array:
    """R²: `products[a, b]` is what value a explains of b, relative to what b itself does; the mean of both ways."""
    diagonal = np.diag(products)
    scale = np.where(diagonal > 0, 1 / np.where(diagonal > 0, diagonal, 1), 0)
    ratio = products * scale[None, :]
    return _proper((ratio + ratio.T) / 2)


def _proper(similarity: Array) -> Array:
    result: Array = np.clip(similarity, 0, 1)
    np.fill_diagonal(result, 1)
    return result


def similarity(features: Sequence[Array], estimator: str = "cka") -> Array:
    """All pairwise similarities of values, each given as features (n, p)."""
    check(estimator)
    collected = Products(len(features), len(features[0]), estimator)
    for values in features:
        collected.add(flatten(kernel(values, estimator), estimator))
    return collected.similarity()
