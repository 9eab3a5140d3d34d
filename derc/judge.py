"""Predictions of a network on a split, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from derc.artifacts import Array
from derc.data import Data, Split, label_map
from derc.engine import Session
from derc.lowered import Lowered
from derc.mode import in_eval


@torch.no_grad()
def logits(network: nn.Module, split: Split, batch: int = 64) -> torch.Tensor:
    """(n, classes) outputs in eval mode; each part's own mode is restored."""
    with in_eval(network):
        return torch.cat([network(images) for images, _ in split.batches(batch)])


def run_logits(session: Session, split: Split, batch: int) -> torch.Tensor:
    """(n, classes) outputs of an engine that was built for batches of `batch`."""
    found = [run_all(session, images.numpy(), batch) for images, _ in split.batches(batch)]
    return torch.from_numpy(np.concatenate(found))


def run_all(session: Session, images: Array, batch: int) -> Array:
    """Outputs for any number of images, the last batch filled up with repeats."""
    rows = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        rows.append(session.run(filled)[: len(part)])
    return np.concatenate(rows)


def answers(outputs: torch.Tensor, columns: tuple[int, ...] | None) -> Array:
    """Predicted class indices; `columns` maps the data set's classes to outputs."""
    picked = outputs if columns is None else outputs[:, list(columns)]
    found: Array = picked.argmax(1).numpy()
    return found


def correct(outputs: torch.Tensor, split: Split, columns: tuple[int, ...] | None) -> Array | None:
    """Which images are answered right; None without labels."""
    if split.labels is None or columns is None:
        return None
    right: Array = answers(outputs, columns) == split.labels
    return right


def columns_of(labels: tuple[str, ...] | None, data: Data) -> tuple[int, ...] | None:
    """Which output stands for each class of the data set, or None where there are no classes or they do not fit."""
    return None if data.classes is None else label_map(labels, data.classes)


def consensus(donors: Iterable[Lowered], split: Split) -> Array:
    """Class indices that the donors' mean softmax predicts; their heads must agree in their classes."""
    found: Array = beliefs([(donor, None) for donor in donors], split).argmax(1)
    return found


def beliefs(donors: Iterable[tuple[Lowered, tuple[int, ...] | None]], split: Split) -> Array:
    """(n, classes) float32: the donors' mean softmax over the outputs that each one's columns pick, None: all."""
    rows = [(logits(donor.program, split), columns) for donor, columns in donors]
    if not rows:
        raise ValueError("consensus needs at least one donor")
    picked = [outputs if columns is None else outputs[:, list(columns)] for outputs, columns in rows]
    found: Array = (sum(one.softmax(1) for one in picked) / len(picked)).numpy()  # type: ignore[union-attr]
    return found
