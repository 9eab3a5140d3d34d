"""Batch norms: which of a network's are broken, and their statistics estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from derc.artifacts import Array

LEAST_EPS = 1e-12
"""Torch trains no batch norm with an eps of zero, which one that only runs may have."""


def norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a module that keep running statistics, by path."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    return {name: part for name, part in found.items() if part.running_mean is not None}


def broken(module: nn.Module) -> str | None:
    """A clause that names the first batch norm whose statistics are no mean and variance, None where all are."""
    for name, norm in norms(module).items():
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            continue
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            return f"the batch norm {name} has running statistics that are not finite"
        if (variance < 0).any() or not (variance > 0).any():
            what = "negative" if (variance < 0).any() else "all zero"
            return f"the batch norm {name} has running variances that are {what}"
    return None


@torch.no_grad()
def reestimated(
    parts: Sequence[nn.Module], batches: Iterable[torch.Tensor], chosen: Sequence[bool]
) -> tuple[dict[str, Array], ...]:
    """For each part in a row the running statistics that its batch norms have on these inputs of the first one.

    Every batch counts the same; each norm sees what the ones before it give when they normalise by the batch. Empty
    for a part that is not `chosen` or has no batch norms. The parts themselves stay as they are.
    """
    copies = [copy.deepcopy(part).eval() for part in parts]
    found = [norms(part) if wanted else {} for part, wanted in zip(copies, chosen, strict=True)]
    for norm in (norm for one in found for norm in one.values()):
        norm.reset_running_stats()
        norm.momentum = None
        norm.eps = max(norm.eps, LEAST_EPS)
        norm.train()
    for x in batches:
        for part in copies:
            x = part(x.clone())
    return tuple(
        {f"{name}.{key}": value.numpy().copy() for name, norm in one.items() for key, value in norm.named_buffers()}
        for one in found
    )
