"""stitch: fit the adapters of an assembly in closed form on probe activations (streaming ridge regression)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from derc import fronts
from derc.artifacts import Array, Assembly, StitchedAssembly, digest
from derc.assembled import new_stitch
from derc.data import Split
from derc.errors import UsageError
from derc.fronts import Step
from derc.modules import Stitch
from derc.pipeline import Context

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties tried, as shares of the mean squared feature."""
HELD_BACK = 4
"""Every fourth batch chooses the penalty; batches are so small that there are as many."""
NAMES = "the network in front", "the donor behind the stitch"
"""What errors call both sides of a stitch where donors' names are not known."""


class Moments:
    """Sums for the regression of targets (n, q) on features (n, p) with intercept, in float64."""

    def __init__(self, features: int, targets: int) -> None:
        self.xx = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.xy = torch.zeros(features + 1, targets, dtype=torch.float64)
        self.yy = torch.zeros(targets, dtype=torch.float64)

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
        penalty = strength * xx.diagonal().mean().clamp_min(1e-12)
        weight = torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=torch.float64), xy)
        return torch.cat([weight, (mean_y - mean_x @ weight)[None]])

    def unexplained(self, coefficients: torch.Tensor) -> float:
        """Share of the targets' variance that `coefficients` leave, on these sums."""
        cross = (coefficients * self.xy).sum()
        square = (coefficients * (self.xx @ coefficients)).sum()
        count = self.xx[-1, -1]
        variance = self.yy.sum() - (self.xy[-1] ** 2).sum() / count
        return float((self.yy.sum() - 2 * cross + square) / variance.clamp_min(1e-12))


def ridge(fit: Moments, held: Moments) -> tuple[torch.Tensor, float]:
    """Coefficients at the penalty that is best on `held`, refitted on everything, and the share unexplained there."""
    errors = [(held.unexplained(fit.solve(strength)), strength) for strength in STRENGTHS]
    error, strength = min(errors)
    return (fit + held).solve(strength), error


@dataclass(frozen=True)
class FitStitches:
    """Fits an assembly's stitches in order, each on what the network before it really gives.

    Images go through in batches of at most `batch`.
    """

    batch: int = 32
    name: ClassVar[str] = "stitch"
    produces: ClassVar[type] = StitchedAssembly

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.probe.digest)

    def run(self, context: Context, assembly: Assembly) -> StitchedAssembly:
        states: list[dict[str, Array]] = []
        residual: list[float] = []
        front: list[Step] = []
        run = partial(context.fronts.run, context.data.probe, self._size(context.data.probe))
        for index, block in enumerate(assembly.blocks):
            lowered = context.lowered[block.donor]
            if index and assembly.stitched[index - 1]:
                stitch = new_stitch(assembly, index, context.lowered)
                donor = fronts.block(lowered, replace(block, first=0, last=block.first))
                names = f"donor {assembly.blocks[index - 1].donor}", f"donor {block.donor}"
                residual.append(self.fit_to(stitch, run(front), run([donor]), names))
                states.append({name: value.detach().numpy().copy() for name, value in stitch.state_dict().items()})
                front.append(fronts.added(stitch))
            front.append(fronts.block(lowered, block))
        return StitchedAssembly(assembly, tuple(states), tuple(residual))

    def fit(
        self, stitch: Stitch, front: nn.Module, donor: nn.Module, probe: Split, names: tuple[str, str] = NAMES
    ) -> float:
        """Set `stitch` so that stitch(front(x)) ≈ donor(x) on the probe images; see `fit_to`."""
        sources = (front(images.clone()) for images, _ in probe.batches(self._size(probe)))
        targets = (donor(images.clone()) for images, _ in probe.batches(self._size(probe)))
        return self.fit_to(stitch, sources, targets, names)

    def _size(self, probe: Split) -> int:
        return max(1, min(self.batch, len(probe) // HELD_BACK))

    @torch.no_grad()
    def fit_to(
        self,
        stitch: Stitch,
        sources: Iterable[torch.Tensor],
        targets: Iterable[torch.Tensor],
        names: tuple[str, str] = NAMES,
    ) -> float:
        """Set `stitch` so that stitch(source) ≈ target in all batches; returns the share unexplained on held-back ones.

        Raises UsageError, with the donor's name of `names`, where activations are not finite.
        """
        body: list[Moments] = []
        prefix: list[Moments] = []
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            for value, name in zip((source, target), names, strict=True):
                if not torch.isfinite(value).all():
                    raise UsageError(
                        f"{name} gives values that are not finite, so no stitch can be fitted: leave it out"
                    )
            held = number % HELD_BACK == HELD_BACK - 1
            _accumulate(body, held, *body_rows(stitch, source, target))
            if stitch.prefix is not None:
                _accumulate(prefix, held, stitch.split(source)[1], target[:, : stitch.target_prefix].flatten(1))
        error = _assign(stitch.linear, body)
        if stitch.prefix is not None:
            _assign(stitch.prefix, prefix)
        return error


def _accumulate(pair: list[Moments], held: bool, features: torch.Tensor, targets: torch.Tensor) -> None:
    if not pair:
        pair.extend(Moments(features.shape[1], targets.shape[1]) for _ in range(2))
    pair[held].add(features, targets)


def _assign(linear: nn.Linear, pair: list[Moments]) -> float:
    fit, held = pair
    if held.xx[-1, -1] == 0:
        held = fit
    coefficients, error = ridge(fit, held)
    linear.weight.copy_(coefficients[:-1].T)
    linear.bias.copy_(coefficients[-1])
    return error


def body_rows(stitch: Stitch, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both activations as (rows, channels), a row for each image and position of the target's grid.

    Regridding and the linear map commute, so this is the stitch's own least-squares problem.
    """
    x, _ = stitch.split(source)
    if stitch.target_layout == "NC":
        return x.mean((2, 3)), target
    x = stitch.enlarge(stitch.shrink(x))
    return x.permute(0, 2, 3, 1).flatten(0, 2), _positions(stitch, target)


def _positions(stitch: Stitch, target: torch.Tensor) -> torch.Tensor:
    """The target's positions, row by row, as (rows, channels)."""
    match stitch.target_layout:
        case "NCHW":
            return target.permute(0, 2, 3, 1).flatten(0, 2)
        case "NHWC":
            return target.flatten(0, 2)
        case _:
            return target[:, stitch.target_prefix :].flatten(0, 1)
