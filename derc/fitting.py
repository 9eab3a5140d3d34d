"""Closed-form fits of stitches of every form, to batches of what they get and of what they are to give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from derc.errors import UsageError
from derc.modules import Stitch
from derc.regression import Channels, Moments, low_rank, ridge

HELD_BACK = 4
"""Every fourth batch chooses the penalty; batches are so small that there are as many."""
NAMES = "the network in front", "the donor behind the stitch"
"""What errors call both sides of a stitch where donors' names are not known."""


@torch.no_grad()
def fit(
    stitch: Stitch,
    sources: Iterable[torch.Tensor],
    targets: Iterable[torch.Tensor],
    names: tuple[str, str] = NAMES,
) -> float:
    """Set `stitch` so that stitch(source) ≈ target in all batches; returns the share unexplained on held-back ones.

    Raises UsageError, with the donor's name of `names`, where activations are not finite.
    """
    body, prefix = _Rows(stitch), _Rows(stitch)
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        for value, name in zip((source, target), names, strict=True):
            if not torch.isfinite(value).all():
                raise UsageError(f"{name} gives values that are not finite, so no stitch can be fitted: leave it out")
        held = number % HELD_BACK == HELD_BACK - 1
        body.add(held, *body_rows(stitch, source, target))
        if stitch.target_prefix:
            prefix.add(held, *prefix_rows(stitch, source, target))
    if kind(stitch) != "full":
        return _assign_channels(stitch, body, prefix)
    assert stitch.linear is not None
    inner = getattr(stitch, "inner", None)
    error = _assign(stitch.linear, body) if inner is None else _assign_factors(inner, stitch.linear, body)
    if stitch.prefix is not None:
        _assign(stitch.prefix, prefix)
    return error


def kind(stitch: Stitch) -> str:
    """What its map is; a bundle of an earlier version knows the full one alone, and does not say so."""
    return str(getattr(stitch, "kind", "full"))


class _Rows:
    """Sums of what a stitch's map, or its prefix tokens', is fitted to, and of what is held back."""

    def __init__(self, stitch: Stitch) -> None:
        self.sums = Moments if kind(stitch) == "full" else Channels
        self.found: list[Any] = []

    def add(self, held: bool, features: torch.Tensor, targets: torch.Tensor) -> None:
        if not self.found:
            self.found.extend(self.sums(features.shape[1], targets.shape[1]) for _ in range(2))
        self.found[held].add(features, targets)

    @property
    def pair(self) -> tuple[Any, Any]:
        """To fit to and held back; the former for both where nothing was held back."""
        fit, held = self.found
        return fit, held if held.count else fit


def _assign(linear: nn.Linear, rows: _Rows) -> float:
    coefficients, error = ridge(*rows.pair)
    linear.weight.copy_(coefficients[:-1].T)
    linear.bias.copy_(coefficients[-1])
    return error


def _assign_factors(inner: nn.Linear, linear: nn.Linear, rows: _Rows) -> float:
    (down, up, intercept), error = low_rank(*rows.pair, inner.out_features)
    for weights, found in ((inner.weight, down.T), (linear.weight, up.T), (linear.bias, intercept)):
        weights.copy_(found)
    return error


def _assign_channels(stitch: Stitch, body: _Rows, prefix: _Rows) -> float:
    """Set scales and shifts, where there are any, of each prefix token and of the positions; the positions' error."""
    fit, held = body.pair
    if stitch.scale is None or stitch.shift is None:
        own = torch.ones(fit.sums.shape[1], dtype=torch.float64)
        return float(held.unexplained(torch.stack([own, 0 * own])))
    for rows, place in ((prefix, slice(-1)), (body, slice(-1, None))):
        if rows.found:
            scale, shift = (rows.pair[0] + rows.pair[1]).solve()
            stitch.scale[place] = scale.reshape(-1, stitch.scale.shape[1])
            stitch.shift[place] = shift.reshape(-1, stitch.shift.shape[1])
    return float(held.unexplained(fit.solve()))


def prefix_rows(stitch: Stitch, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What prefix tokens are fitted on, and these tokens, as (images, values)."""
    wanted = target[:, : stitch.target_prefix].flatten(1)
    if kind(stitch) == "full":
        return stitch.split(source)[1], wanted
    return source[:, : stitch.target_prefix].flatten(1), wanted


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
