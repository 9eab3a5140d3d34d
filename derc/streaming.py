"""Similarity in memory that does not grow with the probe set: the unbiased HSIC of small batches, summed, then divided.

A batch's unbiased HSIC of two values is a product of their U-centred kernel matrices (Song et al. 2012; summed over
batches: Nguyen et al. 2021), so that each value is one long vector over all batches, and the similarity a cosine.
`Streamed` keeps the products of all pairs, `Sketched` a random projection of each vector.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import numpy as np

from derc.artifacts import Array
from derc.errors import UsageError
from derc.similarity import LEAST_IMAGES, cosines, kernel, product, u_centre

BATCH = 64
SKETCH = 1024
"""Numbers that a sketched vector has: the similarity of two is off by at most about 1/√SKETCH."""


def bounds(images: int) -> list[tuple[int, int]]:
    """The first and last + 1 image of each batch: an even number of batches of nearly equal size, at most BATCH.

    An even number, so that two halves of the probe set can be compared. No image is left out; where batches would be of
    fewer than 4 there is but one. Raises UsageError for fewer than 4 images.
    """
    if images < LEAST_IMAGES:
        raise UsageError(f"similarity in batches needs at least {LEAST_IMAGES} images, not {images}: raise --probe")
    count = 2 * -(-images // (2 * BATCH))
    if images < 2 * LEAST_IMAGES:
        count = 1
    return list(pairwise(i * images // count for i in range(count + 1)))


def vectors(features: list[Array], share: float, estimator: str) -> Array:
    """Each value's part (values, n (n − 1) / 2) of one batch, scaled so that products are `share` times unbiased HSIC.

    Float32; every value's vector is first divided by its norm in the first batch, by whoever keeps them, if need be.
    """
    n = len(features[0])
    upper = np.triu_indices(n, 1)
    scale = sqrt(2 * share / (n * (n - 3))) if n > 3 else 0.0
    return np.stack([scale * u_centre(kernel(values, estimator))[upper] for values in features]).astype(np.float32)


def refuse_regression(estimator: str) -> None:
    """Raise UsageError for R², which small batches cannot give."""
    if estimator == "r2":
        raise UsageError(
            "--similarity r2 needs all probe images at once and this zoo is too large for that: lower --probe, "
            "or use --similarity cka"
        )


class Streamed:
    """Products of all pairs of `count` values, batch by batch, for the first and the second half of the batches."""

    def __init__(self, count: int) -> None:
        self.halves = np.zeros((2, count, count))
        self.scale: Array | None = None

    def add(self, parts: Array, half: int) -> None:
        """Take one batch's vectors (count, length) into a half."""
        if self.scale is None:
            self.scale = _inverse_norms(parts)
        scaled = parts * self.scale[:, None]
        self.halves[half] += product(scaled, scaled)

    def similarity(self) -> Array:
        return cosines(self.halves.sum(axis=0))

    def similarity_of_halves(self) -> Array:
        """(2, count, count) float32."""
        return np.stack([cosines(half) for half in self.halves]).astype(np.float32)


def _inverse_norms(parts: Array) -> Array:
    """What brings vectors to length 1; of powers of two, so that scaling rounds nothing."""
    norms = np.linalg.norm(parts, axis=1)
    safe = np.where(norms > 0, norms, 1)
    return np.exp2(-np.round(np.log2(safe))).astype(np.float32)


class Sketched:
    """A random projection of each value's long vector, a value's batches one after another in any order of values.

    Each batch fills its own columns, the first half of the batches the first half of the columns. Deterministic.
    """

    def __init__(self, batches: int, size: int = SKETCH) -> None:
        self.columns = np.array([i * size // batches for i in range(batches + 1)])
        self.size = size
        self.maps: dict[int, Array] = {}

    def project(self, parts: Array, batch: int) -> Array:
        """(values, columns of this batch) float32 of one batch's vectors; keeps lengths on average."""
        width = int(self.columns[batch + 1] - self.columns[batch])
        if batch not in self.maps:
            random = np.random.default_rng((7, batch))
            signs = random.integers(0, 2, (parts.shape[1], width), np.int8) * 2 - 1
            self.maps[batch] = signs.astype(np.float32) / np.float32(sqrt(width))
        projected: Array = parts @ self.maps[batch]
        return projected


def unit_rows(rows: Array) -> Array:
    """Rows of length 1; a row of zeros stays one."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
