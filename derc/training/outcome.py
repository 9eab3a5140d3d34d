"""What a training came to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

Row = dict[str, float | int | None]
"""What an epoch came to, a row of the log."""


@dataclass(frozen=True)
class Scored:
    """What a state of the network is worth on the validation images; `loss` is the cross entropy."""

    accuracy: float
    loss: float

    @property
    def rank(self) -> tuple[float, float]:
        """The higher, the better: by accuracy, then by loss; a loss that is no number comes last."""
        return self.accuracy, -self.loss if math.isfinite(self.loss) else -math.inf


@dataclass(frozen=True)
class Trained:
    """The network in its best state, in eval mode on the processor, with the log: a row for each epoch.

    `kept` says what the best state is: the network as it came (before), its weights after epoch `epoch` (weights), or
    their average (average); in `derc finetune` also what donors taught its blocks before the first epoch (blocks).
    `stopped` is whether the time ran out, `micro` how many images went through at a time, `images` how many went
    through in all (with repeats), `device` and `processes` where.
    """

    network: nn.Module
    rows: tuple[Row, ...]
    before: Scored
    after: Scored
    kept: str
    epoch: int
    steps: int
    images: int
    seconds: float
    micro: int
    stopped: bool
    device: str
    processes: int


def untrained(network: nn.Module, scored: Scored, batch: int) -> Trained:
    """A training of no epoch: the network as it came, worth what was `scored`."""
    return Trained(network.eval(), (), scored, scored, "before", 0, 0, 0, 0.0, batch, False, "cpu", 1)
