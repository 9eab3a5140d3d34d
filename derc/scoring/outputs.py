"""What a network answers as it is: accuracy or agreement, and the divergence from the donors' predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from derc.scoring.evidence import BELIEFS, Evidence, Subject


@dataclass(frozen=True)
class Accuracy:
    """Share of validation images answered right, or without labels as the task donors' mean prediction does.

    One forward pass over the validation images.
    """

    name: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[str]] = frozenset()
    sees_precision: ClassVar[bool] = True

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        answers = evidence.picked(subject.outputs(evidence.validation)).argmax(1).numpy()
        return float((answers == evidence.validation_answers).mean())

    def share(self, value: float) -> float:
        return value


@dataclass(frozen=True)
class Divergence:
    """−mean KL(p ‖ q) in nats over the probe images, p the task donors' mean prediction, q the network's.

    Needs no labels. One forward pass over the probe images. Puzzle (Bercovich et al. 2024) measures it against the one
    parent; here it is the mean of all donors that know the task.
    """

    name: ClassVar[str] = "kl"
    needs: ClassVar[frozenset[str]] = frozenset({BELIEFS})
    sees_precision: ClassVar[bool] = True

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        p = torch.from_numpy(evidence.believed()).double()
        log_q = evidence.picked(subject.outputs(evidence.probe)).double().log_softmax(1)
        return -float((torch.special.xlogy(p, p) - p * log_q).sum(1).mean())

    def share(self, value: float) -> float:
        return math.exp(min(value, 0.0))
