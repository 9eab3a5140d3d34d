"""Fisher: what the loss would change, to second order, if each channel were cut (Theis et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from derc.scoring.evidence import ANSWERS, Evidence, Subject, squash
from derc.scoring.untouched import lent

CHANNEL = {F.conv1d: 1, F.conv2d: 1, F.conv3d: 1, F.linear: -1}
"""The channels' axis in what each kind of map gives."""


@dataclass(frozen=True)
class Fisher:
    """Σ over channels of ½ mean_n (Σ_positions a · ∂L_n/∂a)² (Theis et al. 2018; Turner et al. 2020).

    `a` is what convolutions and linear maps give, L_n the cross entropy of image n. One forward and one backward pass.
    """

    images: int = 96
    batch: int = 32
    name: ClassVar[str] = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset({ANSWERS})
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        asked = torch.from_numpy(evidence.asked()[: self.images])
        total = 0.0
        with lent(subject.network, gradients=True):
            for number, (x, _) in enumerate(evidence.probe.batches(self.batch)):
                wanted = asked[number * self.batch : (number + 1) * self.batch]
                if not len(wanted):
                    break
                total += information(subject, evidence, x[: len(wanted)], wanted)
        return total / len(asked)

    def share(self, value: float) -> float:
        return squash(value)


def information(subject: Subject, evidence: Evidence, images: torch.Tensor, wanted: torch.Tensor) -> float:
    """Σ over images and channels of ½ (Σ_positions a · g)², the network's parameters wanting gradients."""
    leaf = images.clone().requires_grad_()
    with Watch(len(images)) as watch:
        outputs = evidence.picked(subject.network(leaf.clone()))
    # Each image's own loss: in eval mode images do not see each other, so the sum's gradient has them side by side.
    torch.autograd.grad(F.cross_entropy(outputs, wanted, reduction="sum"), leaf)
    return float(watch.total)


class Watch(TorchFunctionMode):
    """Adds up, while the backward pass of `images` images runs, what each map's output and its gradient give.

    What is not computed for each image (a table made from positions) is left out.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.total = 0.0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        axis = CHANNEL.get(func)
        if axis is not None and result.requires_grad and result.shape[0] % self.images == 0:
            # A copy, for an activation function may overwrite what the map gave.
            result.register_hook(partial(self._add, result.detach().clone(), axis))
        return result

    def _add(self, value: torch.Tensor, axis: int, gradient: torch.Tensor) -> None:
        effect = (value * gradient).movedim(axis, -1)
        per_image = effect.reshape(self.images, -1, effect.shape[-1]).double().sum(1)
        self.total += float((per_image**2).sum() / 2)
