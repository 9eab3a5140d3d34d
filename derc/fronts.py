"""Activations behind the fronts of networks, kept so that networks that begin alike run their common front once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from derc.artifacts import BlockRef, digest
from derc.data import Split
from derc.lowered import Lowered

LIMIT = 512 * 2**20
"""Bytes that may be kept."""


@dataclass(frozen=True)
class Step:
    """One part of a network: `key` says what it computes, and `keep` whether others may go on from its output."""

    key: Hashable
    module: nn.Module
    keep: bool = True


def block(lowered: Lowered, ref: BlockRef) -> Step:
    """A donor's block in float32."""
    return Step((ref.donor, ref.first, ref.last), lowered.block(ref.first, ref.last).eval())


def added(module: nn.Module) -> Step:
    """A stitch with its weights, of which each follows from the blocks around it, so that nobody else goes on there.

    What it is without weights is what its representation, of type, form and shape, says.
    """
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    return Step(digest(str(module), state), module.eval(), keep=False)


class Fronts:
    """Outputs of steps in a row for batches of images, up to `limit` bytes; the least recently used go first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.taken = 0
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def run(self, split: Split, size: int, steps: Sequence[Step]) -> Iterator[torch.Tensor]:
        """What the steps give for each batch of `size` images, in order; what comes must not be edited in place."""
        keys = [step.key for step in steps]
        for number, (images, _) in enumerate(split.batches(size)):
            places = [(split.digest, size, number, *keys[: place + 1]) for place in range(len(steps))]
            done = next((place for place in reversed(range(len(steps))) if places[place] in self._kept), -1)
            x = images if done < 0 else self._get(places[done])
            for place in range(done + 1, len(steps)):
                x = steps[place].module(x.clone())
                if steps[place].keep:
                    self._put(places[place], x)
            yield x

    def _get(self, key: Hashable) -> torch.Tensor:
        self._kept.move_to_end(key)
        return self._kept[key]

    def _put(self, key: Hashable, value: torch.Tensor) -> None:
        size = value.untyped_storage().nbytes()
        if size > self.limit:
            return
        self._kept[key] = value
        self.taken += size
        while self.taken > self.limit:
            self.taken -= self._kept.popitem(last=False)[1].untyped_storage().nbytes()
