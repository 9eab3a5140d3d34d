"""The Python interface: compile, load, lower."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from derc.lowered import Lowered


def lower(module: nn.Module, input_shape: tuple[int, int, int], *, name: str = "network") -> Lowered:
    """Trace and cut `module` for images of `input_shape` (C, H, W): gives `.cuts`, `.units`, `.block(i, j)`.

    Raises UsageError where the forward pass depends on the data.
    """
    from derc.passes.cut import find_cuts
    from derc.passes.lower import lower as trace

    lowered = trace(module, input_shape, name=name)
    return lowered.with_cuts(find_cuts(lowered.graph))
