"""The accuracy of a network on labelled images."""

from __future__ import annotations

import torch
from torch import nn

from derc.mode import in_eval
from derc.training.examples import Examples, in_order


@torch.no_grad()
def accuracy(network: nn.Module, images: Examples, columns: tuple[int, ...] | None = None, batch: int = 64) -> float:
    """The share of right answers, in eval mode; each part's own mode is restored."""
    right = 0
    with in_eval(network):
        for part, labels in in_order(images, batch):
            outputs = network(part)
            picked = outputs if columns is None else outputs[:, list(columns)]
            right += int((picked.argmax(1) == labels).sum())
    return right / len(images)
