"""A donor as the teacher of another network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from derc.data import label_map
from derc.donor import Donor
from derc.errors import UsageError
from derc.modules import Normalize
from derc.training.data import some


class Teacher(nn.Module):
    """Images (N, C, H, W) in [0, 1] in, the donor's logits for the classes asked for out, in eval mode.

    Images of another size are interpolated, and those of other channels become their mean or are repeated.
    """

    picked: Tensor

    def __init__(self, network: nn.Module, donor: Donor, columns: tuple[int, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(donor.mean, donor.std)
        self.network = network
        self.channels, *size = donor.input_size
        self.size = tuple(size)
        self.register_buffer("picked", torch.tensor(columns))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        logits: Tensor = self.network(self.normalize(x))[:, self.picked]
        return logits


def teacher_of(donor: Donor, classes: tuple[str, ...]) -> Teacher:
    """The donor as a teacher of `classes`; raises UsageError where its labels do not fit them."""
    columns = label_map(donor.labels, classes)
    if columns is None:
        known = "unknown" if donor.labels is None else some(donor.labels)
        raise UsageError(
            f"the teacher {donor.name} cannot teach the classes {some(classes)}, its own are {known}: "
            "name another donor, or --teacher none"
        )
    return Teacher(donor.build(), donor, columns)
