"""Least squares from sums over batches: what stitches of every form are fitted by."""

from __future__ import annotations

import torch

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties tried, as shares of the mean squared feature."""


class Moments:
    """Sums for the regression of targets (n, q) on features (n, p) with intercept, in float64."""

    def __init__(self, features: int, targets: int) -> None:
        self.xx = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.xy = torch.zeros(features + 1, targets, dtype=torch.float64)
        self.yy = torch.zeros(targets, dtype=torch.float64)

    @property
    def count(self) -> float:
        """Rows so far."""
        return float(self.xx[-1, -1])

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
        y = targets.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += (y * y).sum(0)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.xx) - 1, self.xy.shape[1])
        total.xx, total.xy, total.yy = self.xx + other.xx, self.xy + other.xy, self.yy + other.yy
        return total

    def centred(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """XᵀX (p, p) and XᵀY (p, q) around the means of features and targets, and these means."""
        count = self.xx[-1, -1]
        mean_x, mean_y = self.xx[:-1, -1] / count, self.xy[-1] / count
        xx = self.xx[:-1, :-1] - count * torch.outer(mean_x, mean_x)
        return xx, self.xy[:-1] - count * torch.outer(mean_x, mean_y), mean_x, mean_y

    def solve(self, strength: float) -> torch.Tensor:
        """(p + 1, q) coefficients; the intercept is not penalised. (XᵀX + λI)⁻¹ XᵀY around the means."""
        xx, xy, mean_x, mean_y = self.centred()
        weight = torch.linalg.solve(penalised(xx, strength), xy)
        return torch.cat([weight, (mean_y - mean_x @ weight)[None]])

    def factors(self, strength: float, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(p, rank) and (rank, q) coefficients, and the intercept (q): the best of this rank, penalised as in `solve`.

        Reduced-rank ridge regression (Mukherjee and Zhu 2011): `solve`'s, in the directions that it explains most in.
        """
        xx, xy, mean_x, mean_y = self.centred()
        root = torch.linalg.cholesky(penalised(xx, strength))
        explained = torch.linalg.solve_triangular(root, xy, upper=False)
        up = directions(explained, rank).T
        down = torch.linalg.solve_triangular(root.T, explained @ up.T, upper=True)
        return down, up, mean_y - mean_x @ down @ up

    def unexplained(self, coefficients: torch.Tensor) -> float:
        """Share of the targets' variance that `coefficients` leave, on these sums."""
        cross = (coefficients * self.xy).sum()
        square = (coefficients * (self.xx @ coefficients)).sum()
        count = self.xx[-1, -1]
        variance = self.yy.sum() - (self.xy[-1] ** 2).sum() / count
        return float((self.yy.sum() - 2 * cross + square) / variance.clamp_min(1e-12))


class Channels:
    """Sums for the regression of each channel of targets (n, c) on the same channel of features alone, in float64."""

    def __init__(self, features: int, targets: int) -> None:
        if features != targets:
            raise ValueError(f"{features} features are not the {targets} targets' own")
        self.count = 0.0
        self.sums = torch.zeros(5, targets, dtype=torch.float64)
        """Of x, y, x², xy and y²."""

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        x, y = features.double(), targets.double()
        self.count += len(x)
        self.sums += torch.stack([values.sum(0) for values in (x, y, x * x, x * y, y * y)])

    def __add__(self, other: Channels) -> Channels:
        total = Channels(self.sums.shape[1], self.sums.shape[1])
        total.count, total.sums = self.count + other.count, self.sums + other.sums
        return total

    def solve(self) -> torch.Tensor:
        """(2, c): each channel's scale and shift by least squares; the scale of a channel that says nothing is 0."""
        mean_x, mean_y, square, product, _ = self.sums / self.count
        variance, covariance = square - mean_x**2, product - mean_x * mean_y
        useful = variance > 1e-12 * square
        scale = torch.where(useful, covariance / torch.where(useful, variance, 1.0), 0.0)
        return torch.stack([scale, mean_y - scale * mean_x])

    def unexplained(self, coefficients: torch.Tensor) -> float:
        """Share of the targets' variance that scale and shift (2, c) leave, on these sums."""
        (scale, shift), (x, y, xx, xy, yy) = coefficients, self.sums
        left = yy + scale**2 * xx + shift**2 * self.count + 2 * (scale * shift * x - scale * xy - shift * y)
        variance = (yy - y**2 / self.count).sum()
        return float(left.sum() / variance.clamp_min(1e-12))


def penalised(xx: torch.Tensor, strength: float) -> torch.Tensor:
    """XᵀX + λI, λ being `strength` times the mean squared feature."""
    return xx + strength * xx.diagonal().mean().clamp_min(1e-12) * torch.eye(len(xx), dtype=xx.dtype)


def directions(explained: torch.Tensor, rank: int) -> torch.Tensor:
    """(q, rank), orthonormal: what the rows of `explained` (p, q) lie along most, the most of all last."""
    rows, columns = explained.shape
    narrow = explained if columns <= rows else explained.T
    _, vectors = torch.linalg.eigh(narrow.T @ narrow)
    found: torch.Tensor = vectors[:, -rank:]
    if columns > rows:
        found = torch.linalg.qr(narrow @ found)[0]
    return found


def low_rank(fit: Moments, held: Moments, rank: int) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """As `ridge`, of the `rank`: `Moments.factors`, and the share unexplained."""
    errors = []
    for strength in STRENGTHS:
        down, up, intercept = fit.factors(strength, rank)
        errors.append((held.unexplained(torch.cat([down @ up, intercept[None]])), strength))
    error, strength = min(errors)
    return (fit + held).factors(strength, rank), error


def ridge(fit: Moments, held: Moments) -> tuple[torch.Tensor, float]:
    """Coefficients at the penalty that is best on `held`, refitted on everything, and the share unexplained there."""
    errors = [(held.unexplained(fit.solve(strength)), strength) for strength in STRENGTHS]
    error, strength = min(errors)
    return (fit + held).solve(strength), error
