"""A network lent to a proxy and given back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from derc.mode import in_eval


@contextmanager
def lent(network: nn.Module, *, gradients: bool = False) -> Iterator[list[nn.Parameter]]:
    """Inside, `network` is in eval mode, and its floating parameters, which this gives, want `gradients` or do not.

    Afterwards training modes, buffers and what wants a gradient are as before. Use `torch.autograd.grad` inside, which
    leaves `.grad` alone.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    floating = [parameter for parameter, _ in wanted if parameter.is_floating_point()]
    with in_eval(network), torch.set_grad_enabled(gradients):
        for parameter in floating:
            parameter.requires_grad_(gradients)
        try:
            yield floating
        finally:
            for parameter, before in wanted:
                parameter.requires_grad_(before)
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)
