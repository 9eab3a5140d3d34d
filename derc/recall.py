"""What networks' fronts give for images by number, computed when first asked for and kept while it fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from derc.data import Split
from derc.fronts import Step

LIMIT = 512 * 2**20
"""Bytes that may be kept."""
CHUNK = 64
"""Images that run at once."""


@dataclass
class _Kept:
    """Values of one front for all images of a split; `known` marks the images that have been computed."""

    values: torch.Tensor
    known: torch.Tensor

    @property
    def bytes(self) -> int:
        return self.values.numel() * self.values.element_size()


class Recall:
    """What steps in a row give for any images of a split; the least recently used fronts go first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    @torch.no_grad()
    def outputs(self, split: Split, steps: Sequence[Step], numbers: torch.Tensor) -> torch.Tensor:
        """(n, …) values behind the last step for the images of these numbers; may be edited.

        What is kept was computed in the same batches, whichever images were asked for first.
        """
        kept = self._of(split, steps)
        if kept is None:
            return torch.cat([_run(steps, split.take(part)) for part in chunks(numbers)])
        for start in sorted({int(number) // CHUNK * CHUNK for number in numbers[~kept.known[numbers]]}):
            chunk = torch.arange(start, min(start + CHUNK, len(split)))
            kept.values[chunk] = _run(steps, split.take(chunk))
            kept.known[chunk] = True
        return kept.values[numbers]

    def _of(self, split: Split, steps: Sequence[Step]) -> _Kept | None:
        """Where these values are kept, made on first use; None where they would not fit."""
        key = (split.digest, *(step.key for step in steps))
        if key not in self._kept:
            one = _run(steps, split.take(torch.arange(1)))
            fits = one.numel() * one.element_size() * len(split) <= self.limit
            room = torch.empty(len(split) if fits else 0, *one.shape[1:], dtype=one.dtype)
            self._kept[key] = _Kept(room, torch.zeros(len(split), dtype=torch.bool))
        self._kept.move_to_end(key)
        while sum(kept.bytes for kept in self._kept.values()) > self.limit:
            self._kept.popitem(last=False)
        found = self._kept[key]
        return found if len(found.values) else None


def chunks(numbers: torch.Tensor, size: int = CHUNK) -> list[torch.Tensor]:
    """The numbers in order, `size` at a time, the last part maybe fewer."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _run(steps: Sequence[Step], x: torch.Tensor) -> torch.Tensor:
    for step in steps:
        x = step.module(x.clone())
    return x
