"""jacov: how little the network's derivatives by its images are correlated (Mellor et al. 2020, first version)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from derc.artifacts import Array
from derc.scoring.evidence import Evidence, Subject
from derc.scoring.untouched import lent

FLOOR = 1e-5
"""What is added to every eigenvalue, as published."""


@dataclass(frozen=True)
class Jacov:
    """−Σ log(σ + k) + 1 / (σ + k) over the eigenvalues σ of the Jacobians' correlations, k = 1e-5.

    Row n of the Jacobian is the derivative of the sum of image n's outputs by its pixels; mean over batches. One
    forward and one backward pass (arXiv 2006.04647v1).
    """

    images: int = 96
    batch: int = 32
    name: ClassVar[str] = "jacov"
    needs: ClassVar[frozenset[str]] = frozenset()
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        values = []
        with lent(subject.network):
            for number, (x, _) in enumerate(evidence.probe.batches(self.batch)):
                if number * self.batch >= self.images or len(x) < self.batch:
                    break
                values.append(score(jacobian(subject.network, x)))
        return float(np.mean(values)) if values else -np.inf

    def share(self, value: float) -> float:
        """1 where nothing is correlated, for then the value is minus the number of images."""
        return float(min(self.batch / max(-value, 1e-12), 1.0))


def jacobian(network: torch.nn.Module, images: torch.Tensor) -> Array:
    """(n, pixels): derivative of the sum of each image's outputs; images do not see each other in eval mode."""
    with torch.enable_grad():
        leaf = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(network(leaf.clone()).sum(), leaf)
    result: Array = found.flatten(1).double().numpy()
    return result


def score(rows: Array) -> float:
    """The score of the rows' correlation matrix; a constant row is correlated with nothing."""
    centred = rows - rows.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    values = np.linalg.eigvalsh(unit @ unit.T).clip(0) + FLOOR
    return float(-(np.log(values) + 1 / values).sum())
