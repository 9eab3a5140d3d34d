"""What a stitch between two donors' cuts will lose, before any network is assembled.

Two things are known of donors alone. How much of a cut's value is a linear function of another's is told by the ridge
regression that the stitch itself would be, on a sample of rows (`Sample`, `unexplained`). How much a donor minds is
told by what becomes of its answers when its own value is blurred as such a stitch would blur it (`blurred`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from derc.ir import Layout, TensorType
from derc.regression import directions
from derc.stitching import PLAIN, Form, common_grids

STRENGTHS = (1e-4, 1e-2, 1.0)
"""Ridge penalties tried, as shares of the mean squared feature."""
HELD_BACK = 4
"""Every fourth image chooses the penalty, and the error is on those."""
ROWS = 4096
"""Rows of each regression."""
Grid = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """A cut's value as rows of a `coarse` grid: it is read as `fine` and regridded as a stitch does."""

    fine: Grid
    coarse: Grid
    regrid: str = "mean"

    def shrink(self, grid: torch.Tensor) -> torch.Tensor:
        """(n, channels, *fine) on the coarse grid."""
        if self.regrid == "strided":
            return grid[:, :, :: self.fine[0] // self.coarse[0], :: self.fine[1] // self.coarse[1]]
        if self.regrid == "bilinear":
            return F.interpolate(grid, size=self.coarse, mode="bilinear", align_corners=False)
        return F.adaptive_avg_pool2d(grid, self.coarse)


def places(source: TensorType, target: TensorType, regrid: str = "mean") -> tuple[Place, Place]:
    """Where a stitch's map runs: on the coarser of both grids, along each axis."""
    one, other = common_grids(source, target)
    coarse = min(one[0], other[0]), min(one[1], other[1])
    return Place(one, coarse, regrid), Place(other, coarse)


def tokens(value: torch.Tensor, kind: TensorType) -> torch.Tensor | None:
    """A batch's class and register tokens, (n, prefix, channels), None where there are none."""
    return value[:, : kind.prefix] if kind.prefix else None


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
    tokens: list[torch.Tensor] = field(default_factory=list)
    within: float = 0.0
    seen: int = 0

    def add(self, positions: torch.Tensor, prefix: torch.Tensor | None = None) -> None:
        """Take a batch's (n, positions, channels), and its class and register tokens (n, prefix, channels) if any."""
        if prefix is not None:
            self.tokens.append(prefix.double())
        grid = positions.double().transpose(1, 2).reshape(len(positions), -1, *self.place.fine)
        if self.place.coarse != self.place.fine:
            whole = float(grid.square().mean((2, 3)).sum())
            grid = self.place.shrink(grid)
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
    def prefix(self) -> tuple[Sample, ...]:
        """The class and register tokens, each as a sample of its own, in which every image is a row."""
        if not self.tokens:
            return ()
        tokens = torch.cat(self.tokens)
        held = torch.arange(len(tokens)) % HELD_BACK == HELD_BACK - 1
        one = Place((1, 1), (1, 1))
        return tuple(
            Sample(one, self.images, [token[~held]], [token[held]], seen=len(token)) for token in tokens.unbind(1)
        )

    @cached_property
    def test(self) -> torch.Tensor:
        """(rows, channels) of the images that are held back; those of the fit where there is none."""
        held = torch.cat(self.held)
        return held if len(held) else self.fit


@dataclass
class Regressor:
    """Regressions on one source's sample, of any targets in any forms."""

    source: Sample

    def left(self, target: Sample, forms: Sequence[Form]) -> list[float]:
        """For each form's map, the share of the target's variance that is left on held-back images, in [0, 1].

        The ridge penalty is the best one there. What positions differ by within a cell of the coarse grid is left, too.
        Where each class and register token is made of its own one alone, it is at least what is left of any of them: an
        answer may hang on one of them, of which the positions say little.
        """
        ranks = self._ridge(target, {form.rank for form in forms if form.map == "full"})
        return [self._left(target, form, ranks) for form in forms]

    def _left(self, target: Sample, form: Form, ranks: Mapping[int, float]) -> float:
        test = target.test
        lost = target.within / target.seen
        whole = max(lost + float(((test - test.mean(0)) ** 2).sum(1).mean()), 1e-12)
        if form.map == "full":
            return min(1.0, (lost + ranks[form.rank]) / whole)
        left = min(1.0, (lost + self._alone(target, form)) / whole)
        pairs = zip(self.source.prefix, target.prefix, strict=False)
        return max([left, *(Regressor(own)._left(other, form, {}) for own, other in pairs)])

    def _alone(self, target: Sample, form: Form) -> float:
        """Mean squared error of a row on held-back images of a map of each channel for itself."""
        x, y = self.source.fit, target.fit
        scale, shift = torch.ones(1, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)
        if form.map == "affine":
            spread = x - x.mean(0)
            scale = (spread * y).sum(0) / spread.square().sum(0).clamp_min(1e-12)
            shift = y.mean(0) - scale * x.mean(0)
        return float((self.source.test * scale + shift - target.test).square().sum(1).mean())

    @cached_property
    def _turned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows to fit to and rows held back in the axes in which the former's features are uncorrelated; their sums."""
        mean = self.source.fit.mean(0)
        x, x_test = self.source.fit - mean, self.source.test - mean
        spectrum, vectors = torch.linalg.eigh(x.T @ x)
        return x @ vectors, x_test @ vectors, spectrum.clamp_min(0)

    def _ridge(self, target: Sample, ranks: Set[int]) -> dict[int, float]:
        """The same of linear maps of these ranks, 0: whole, at the penalty that is best for a whole one."""
        turned, tested, spectrum = self._turned
        size = spectrum.mean().clamp_min(1e-12)
        middle = target.fit.mean(0)
        products, wanted = turned.T @ (target.fit - middle), target.test - middle
        errors = []
        for strength in STRENGTHS:
            missed = wanted - tested @ (products / (spectrum + strength * size)[:, None])
            errors.append((float((missed * missed).sum(1).mean()), strength))
        best, strength = min(errors)
        found, scales = {0: best}, (spectrum + strength * size).sqrt()[:, None]
        every = directions(products / scales, max(ranks)) if max(ranks, default=0) else None
        for rank in ranks - {0}:
            assert every is not None
            kept = every[:, -rank:]
            missed = wanted - tested @ (products @ kept / scales**2) @ kept.T
            found[rank] = float((missed * missed).sum(1).mean())
        return found


def unexplained(source: Sample, targets: Sequence[Sample]) -> list[float]:
    """Share of each target's variance that the best ridge regression on `source` leaves on held-back images, in [0, 1].

    What a target's positions differ by within a cell of the coarse grid is left, too.
    """
    regressor = Regressor(source)
    return [regressor.left(target, [PLAIN])[0] for target in targets]


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
