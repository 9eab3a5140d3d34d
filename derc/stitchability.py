"""What a stitch between two donors' cuts will lose, before any network is assembled.

Two things are known of donors alone. How much of a cut's value is a linear function of another's is told by the ridge
regression that the stitch itself would be, on a sample of rows (`Sample`, `unexplained`). How much a donor minds is
told by what becomes of its answers when its own value is blurred as such a stitch would blur it (`blurred`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from derc.ir import Layout, TensorType
from derc.stitching import common_grids

STRENGTHS = (1e-4, 1e-2, 1.0)
"""Ridge penalties tried, as shares of the mean squared feature."""
HELD_BACK = 4
"""Every fourth image chooses the penalty, and the error is on those."""
ROWS = 4096
"""Rows of each regression."""
Grid = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """A cut's value as rows of a `coarse` grid: it is read as `fine` and averaged by area."""

    fine: Grid
    coarse: Grid


def places(source: TensorType, target: TensorType) -> tuple[Place, Place]:
    """Where a stitch's linear map runs: on the coarser of both grids, along each axis."""
    one, other = common_grids(source, target)
    coarse = min(one[0], other[0]), min(one[1], other[1])
    return Place(one, coarse), Place(other, coarse)


def maps(value: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """A batch's positions as (n, positions, channels), without class and register tokens."""
    match kind.layout:
        case Layout.NCHW:
            return value.flatten(2).transpose(1, 2)
        case Layout.NLC:
            return value[:, kind.prefix :]
        case Layout.NC:
            return value[:, None]
        case _:
            return value.flatten(1, -2)


@lru_cache(maxsize=256)
def picked(first: int, count: int, positions: int, wanted: int) -> torch.Tensor:
    """(count, ≤ wanted) positions of the images from number `first` on, without repetition; the same at each call."""
    generator = torch.Generator().manual_seed(first)
    return torch.rand(count, positions, generator=generator).argsort(1)[:, :wanted]


@dataclass
class Sample:
    """Rows of one cut at one place, collected batch by batch, and how much differs within the grid's cells.

    The same `images` in the same batches give the same positions for every cut at the same coarse grid.
    """

    place: Place
    images: int
    rows: list[torch.Tensor] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    within: float = 0.0
    seen: int = 0

    def add(self, positions: torch.Tensor) -> None:
        """Take a batch's (n, positions, channels)."""
        grid = positions.double().transpose(1, 2).reshape(len(positions), -1, *self.place.fine)
        if self.place.coarse != self.place.fine:
            whole = float(grid.square().mean((2, 3)).sum())
            grid = F.adaptive_avg_pool2d(grid, self.place.coarse)
            self.within += max(0.0, whole - float(grid.square().mean((2, 3)).sum()))
        cells = grid.flatten(2).transpose(1, 2)
        chosen = picked(self.seen, len(cells), cells.shape[1], max(1, ROWS // self.images))
        some = cells.gather(1, chosen[..., None].expand(*chosen.shape, cells.shape[2]))
        held = torch.arange(self.seen, self.seen + len(cells)) % HELD_BACK == HELD_BACK - 1
        self.rows.append(some[~held].flatten(0, 1))
        self.held.append(some[held].flatten(0, 1))
        self.seen += len(cells)

    @cached_property
    def fit(self) -> torch.Tensor:
        """(rows, channels) that the regression is fitted to."""
        return torch.cat(self.rows)

    @cached_property
    def test(self) -> torch.Tensor:
        """(rows, channels) of the images that are held back; those of the fit where there is none."""
        held = torch.cat(self.held)
        return held if len(held) else self.fit


def unexplained(source: Sample, targets: Sequence[Sample]) -> list[float]:
    """Share of each target's variance that the best ridge regression on `source` leaves on held-back images, in [0, 1].

    What a target's positions differ by within a cell of the coarse grid is left, too.
    """
    x, x_test = source.fit, source.test
    mean = x.mean(0)
    x, x_test = x - mean, x_test - mean
    spectrum, vectors = torch.linalg.eigh(x.T @ x)
    spectrum = spectrum.clamp_min(0)
    size = spectrum.mean().clamp_min(1e-12)
    turned, tested = x @ vectors, x_test @ vectors
    found = []
    for target in targets:
        y, y_test = target.fit, target.test
        middle = y.mean(0)
        products = turned.T @ (y - middle)
        variance = float(((y_test - y_test.mean(0)) ** 2).sum(1).mean())
        errors = []
        for strength in STRENGTHS:
            left = y_test - middle - tested @ (products / (spectrum + strength * size)[:, None])
            errors.append(float((left * left).sum(1).mean()))
        lost = target.within / target.seen
        whole = max(lost + variance, 1e-12)
        found.append(float(min(1.0, (lost + min(errors)) / whole)))
    return found


def blurred(value: torch.Tensor, kind: TensorType, share: float, generator: torch.Generator) -> torch.Tensor:
    """`value` as a stitch gives it that leaves `share` of the variance unexplained, in second moments.

    Around its channel's mean each position, token or not, shrinks to 1 − share, and noise of variance
    share · (1 − share) is added: what another position of another image differs from the mean by.
    """
    last = value.movedim(1, -1) if kind.layout is Layout.NCHW else value
    rows = last.reshape(-1, last.shape[-1])
    mean = rows.mean(0)
    other = rows[torch.randperm(len(rows), generator=generator)] - mean
    noisy = mean + (1 - share) * (rows - mean) + math.sqrt(share * (1 - share)) * other
    shaped = noisy.reshape(last.shape)
    return shaped.movedim(-1, 1).contiguous() if kind.layout is Layout.NCHW else shaped
