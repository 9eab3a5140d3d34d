"""What a training refuses before it begins, and how it tells that memory ran out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from derc.errors import UsageError
from derc.training.examples import Examples, in_order


def check_labels(images: Examples, validation: Examples) -> None:
    """Raise UsageError unless both have images and there is more than one class to tell apart."""
    for examples, what in ((images, "training"), (validation, "validation")):
        if len(examples) == 0:
            raise UsageError(f"there are no {what} images: give more data")
    known = np.unique(images.labels)
    if len(known) < 2:
        raise UsageError(f"all {len(images)} training images are of class {known[0]}: training needs two at least")


@torch.no_grad()
def check_outputs(
    network: nn.Module, examples: Examples, columns: tuple[int, ...] | None, classes: int, device: torch.device
) -> int:
    """The number of outputs that are trained; raises UsageError where there are fewer than classes."""
    images, _ = next(in_order(examples, 1))
    outputs = network.eval()(images.to(device)).shape[1]
    if classes > outputs or (columns is not None and max(columns) >= outputs):
        raise UsageError(f"the labels name {classes} classes, and the network has {outputs} outputs: give its own data")
    return outputs if columns is None else len(columns)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or here."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))
