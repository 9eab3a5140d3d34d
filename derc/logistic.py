"""Multinomial logistic regression with an L2 penalty on the weights, by L-BFGS in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from derc.artifacts import Array

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(2, -11, -1))
"""Penalties tried, strongest first, as shares of the mean squared feature."""
ROUGH, EXACT = 1e-4, 1e-7
"""Largest slope of the scaled loss at which a fit ends: while a penalty is chosen, and at the end."""


@dataclass(frozen=True)
class Logistic:
    """Minimises mean cross-entropy + strength · s / 2 · ‖weight‖², s the mean squared centred feature.

    The bias is not penalised. The features are rotated to their principal axes, where the bound of the Hessian
    ½ XᵀX / n + strength · s (Böhning 1992) is diagonal and scales the unknowns, so that few steps are enough.
    """

    classes: int
    strengths: tuple[float, ...] = STRENGTHS
    steps: int = 1000

    def fit(self, x: Array, labels: Array, parts: Sequence[Array]) -> tuple[float, Array, Array, Array]:
        """Strength, weight (d, classes), bias, and the logits (n, classes) of rows whose part was left out.

        The strength has the least log loss over the left-out rows of all `parts`. `strengths` are tried in order, until
        one is worse than the one before.
        """
        mean = x.mean(0)
        _, s, vt = np.linalg.svd(x - mean, full_matrices=False)
        kept = s > 1e-10 * max(float(s.max(initial=0.0)), 1e-300)
        axes, unit = vt[kept].T, max(float(np.square(s).sum()) / x.size, 1e-300) ** 0.5
        z, y = torch.from_numpy((x - mean) @ axes / unit), torch.from_numpy(labels)
        strength, left_out = self._choose(z, y, parts)
        found = self.solve(z, y, strength, None).numpy()
        weight: Array = axes @ found[:-1] / unit
        return strength, weight, found[-1] - mean @ weight, left_out

    def _choose(self, z: torch.Tensor, y: torch.Tensor, parts: Sequence[Array]) -> tuple[float, Array]:
        """The best strength, and the left-out logits there."""
        masks = [torch.isin(torch.arange(len(y)), torch.from_numpy(part)) for part in parts]
        last: list[torch.Tensor | None] = [None] * len(parts)
        best, chosen, kept = float("inf"), self.strengths[0], torch.empty(0)
        for strength in self.strengths:
            logits = torch.empty(len(y), self.classes, dtype=torch.float64)
            for number, mask in enumerate(masks):
                last[number] = found = self.solve(z[~mask], y[~mask], strength, last[number], ROUGH)
                logits[mask] = z[mask] @ found[:-1] + found[-1]
            loss = float(F.cross_entropy(logits, y))
            if loss >= best:
                break
            best, chosen, kept = loss, strength, logits
        return chosen, kept.numpy()

    def solve(
        self, z: torch.Tensor, y: torch.Tensor, strength: float, start: torch.Tensor | None, tolerance: float = EXACT
    ) -> torch.Tensor:
        """(r + 1, classes) weights and bias for scaled features z (n, r), beginning at `start`."""
        ones = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
        penalty = torch.full((ones.shape[1], 1), strength, dtype=z.dtype)
        penalty[-1] = 0
        scale = (0.5 * (ones**2).mean(0)[:, None] + penalty).clamp_min(1e-12).rsqrt()
        first = torch.zeros(ones.shape[1], self.classes, dtype=z.dtype) if start is None else start / scale
        unknown = first.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [unknown],
            max_iter=self.steps,
            history_size=20,
            tolerance_grad=tolerance,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            weight = unknown * scale
            total = F.cross_entropy(ones @ weight, y) + (penalty * weight**2).sum() / 2
            total.backward()  # type: ignore[no-untyped-call]
            return total.detach()

        optimiser.step(loss)  # type: ignore[no-untyped-call]
        return (unknown * scale).detach()
