"""The loss of a batch: cross entropy with the labels, and the divergence from a teacher's softened answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loss:
    """(1 − share) · CE + share · T² · KL(teacher ‖ network), both softened by T (Hinton et al. 2015, section 2.1).

    `smoothing` is that of the labels (Szegedy et al. 2016), of which mixed ones have had theirs.
    """

    smoothing: float = 0.0
    share: float = 0.0
    temperature: float = 1.0

    def __call__(self, outputs: Tensor, targets: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, its labels' and its teacher's part, for outputs (n, classes) and targets (n,) or (n, classes)."""
        outputs = outputs.float()
        mixed = targets.dim() == 2
        labels = F.cross_entropy(outputs, targets, label_smoothing=0.0 if mixed else self.smoothing)
        if taught is None:
            return labels, labels, None
        wanted = (taught.float() / self.temperature).softmax(1)
        found = (outputs / self.temperature).log_softmax(1)
        teacher = F.kl_div(found, wanted, reduction="batchmean") * self.temperature**2
        return (1 - self.share) * labels + self.share * teacher, labels, teacher


def mixing(mixup: float, cutmix: float, smoothing: float, classes: int) -> Mix | None:
    """timm's mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), chosen evenly where both are asked for; or None.

    It draws from numpy's global random state.
    """
    if not (mixup or cutmix):
        return None
    from timm.data import Mixup

    made: Mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes)
    return made


@contextmanager
def seeded(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Torch's and numpy's random states set by seed, step and rank inside, restored afterwards."""
    first, second = (int(n) for n in np.random.SeedSequence([seed, 2, step, rank]).generate_state(2))
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(first)
        np.random.seed(second)
        try:
            yield
        finally:
            np.random.set_state(before)
