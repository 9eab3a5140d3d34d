"""Python source that builds the parts of a network from an ONNX file, their weights left to be loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from derc.errors import UsageError
from derc.onnxdonor.opaque import OnnxNode


def construction(value: Any, donor: str) -> str:
    """The expression that makes a module or parameter, given torch and nn.

    Raises UsageError for an operator without a PyTorch form.
    """
    if isinstance(value, OnnxNode):
        raise UsageError(
            f"donor {donor} has the operator {value.kind}, which has no PyTorch form: its block can be profiled and "
            "selected, but not written as model.py; leave the donor out, or export it without this operator"
        )
    if isinstance(value, nn.Module):
        return f"nn.{value!r}".replace(", bias=True", "")  # what is left out is the default, in older versions too
    return f"nn.Parameter(torch.zeros({tuple(value.shape)}))"
