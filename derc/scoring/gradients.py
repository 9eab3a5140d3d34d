"""grad-norm and SNIP: the loss's gradient by the weights of convolutions and linear maps, before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from derc.scoring.evidence import ANSWERS, Evidence, Subject, squash
from derc.scoring.untouched import lent

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class GradNorm:
    """Sum over weights of the Euclidean norm of the cross entropy's gradient (Abdelfattah et al. 2021).

    Weights are the parameters with two axes or more. One forward and one backward pass.
    """

    images: int = 96
    batch: int = 32
    name: ClassVar[str] = "grad_norm"
    needs: ClassVar[frozenset[str]] = frozenset({ANSWERS})
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        return sum(float(gradient.norm()) for _, gradient in gradients(subject, evidence, self.images, self.batch))

    def share(self, value: float) -> float:
        return squash(value)


@dataclass(frozen=True)
class Snip:
    """Σ |θ ⊙ ∂L/∂θ| over the weights, the sensitivity of the loss to cutting each (Lee et al. 2019).

    The published saliency of one weight is its share of this sum; as a score of a whole network it is the sum
    (Abdelfattah et al. 2021). One forward and one backward pass.
    """

    images: int = 96
    batch: int = 32
    name: ClassVar[str] = "snip"
    needs: ClassVar[frozenset[str]] = frozenset({ANSWERS})
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        found = gradients(subject, evidence, self.images, self.batch)
        return sum(float((weight * gradient).abs().sum()) for weight, gradient in found)

    def share(self, value: float) -> float:
        return squash(value, 10.0)


def gradients(subject: Subject, evidence: Evidence, images: int, batch: int) -> Pairs:
    """Each weight with the gradient of the mean cross entropy over the first `images` probe images, eval mode."""
    asked = torch.from_numpy(evidence.asked()[:images])
    with lent(subject.network, gradients=True) as parameters:
        weights = [parameter for parameter in parameters if parameter.dim() > 1]
        totals = [torch.zeros_like(weight) for weight in weights]
        for number, (x, _) in enumerate(evidence.probe.batches(batch)):
            wanted = asked[number * batch : (number + 1) * batch]
            if not len(wanted):
                break
            loss = F.cross_entropy(evidence.picked(subject.network(x[: len(wanted)])), wanted, reduction="sum")
            found = torch.autograd.grad(loss / len(asked), weights, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient
    return [(weight.detach(), total.detach()) for weight, total in zip(weights, totals, strict=True)]
