"""The accuracy of a network on labelled images, and its cross entropy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from derc.artifacts import Array
from derc.mode import in_eval
from derc.training.examples import Examples, in_order
from derc.training.outcome import Scored


@torch.no_grad()
def correct(network: nn.Module, images: Examples, columns: tuple[int, ...] | None = None, batch: int = 64) -> Array:
    """Which images are answered right, (n,) of bool, in eval mode; each part's own mode is restored."""
    every = _picked(network, images, columns, batch)
    return np.concatenate([(outputs.argmax(1) == labels).numpy() for outputs, labels in every])


def accuracy(network: nn.Module, images: Examples, columns: tuple[int, ...] | None = None, batch: int = 64) -> float:
    """The share of right answers, likewise."""
    return float(correct(network, images, columns, batch).mean())


@torch.no_grad()
def scored(network: nn.Module, images: Examples, columns: tuple[int, ...] | None = None, batch: int = 64) -> Scored:
    """Accuracy and cross entropy likewise; every label must be one of the outputs that are picked."""
    right, loss = 0, 0.0
    for outputs, labels in _picked(network, images, columns, batch):
        right += int((outputs.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(outputs.float(), labels, reduction="sum"))
    return Scored(right / len(images), loss / len(images))


def _picked(
    network: nn.Module, images: Examples, columns: tuple[int, ...] | None, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs that stand for the classes, and the labels, in batches."""
    with in_eval(network):
        for part, labels in in_order(images, batch):
            outputs = network(part)
            yield outputs if columns is None else outputs[:, list(columns)], labels
