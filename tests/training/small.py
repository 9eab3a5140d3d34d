"""Scanned digits for training, and small networks to train on them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from derc.data import Split
from derc.digits import load_split
from derc.images import resize

SIZE = (3, 32, 32)


@cache
def split(name: str, count: int = 300) -> Split:
    """The first images of one of the digits' splits."""
    images, labels = load_split(name)
    return Split(resize(images[:count], SIZE), labels[:count])


class Blocks(nn.Module):
    """The parts of an emitted network: two blocks, one with batch norm and dropout, a stitch, and a head in a block."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.block0 = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.1)
        )
        self.stitch1 = nn.Conv2d(8, 12, 1)
        self.block1 = nn.Sequential(nn.Conv2d(12, 12, 3, 2, 1), nn.ReLU())
        self.block1.fc = nn.Linear(192, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stitch1(self.block0(x))
        x = F.relu(self.block1[0](x)).flatten(1)
        return self.block1.fc(x)


def network(seed: int = 0, **kwargs: bool) -> Blocks:
    torch.manual_seed(seed)
    return Blocks(**kwargs)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are identical, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
