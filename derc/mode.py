"""Training mode: kept and given back, and while tracing an argument that no branch may hang on."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

MODE = "training"
"""The attribute that every module has and graphs may read: whether it is in training mode."""


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; each part's own mode comes back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class ModeBranchError(Exception):
    """A module of type `owner` branches on `self.training`."""

    def __init__(self, owner: type) -> None:
        super().__init__(owner.__name__)
        self.owner = owner


@dataclass
class Mode:
    """What `self.training` is while tracing: an argument for dropout and its like, but no branch may hang on it.

    `binding` is False where eval mode's branch is taken for good; `asked` tells whether one was.
    """

    owner: type
    binding: bool = True
    asked: bool = False

    def __bool__(self) -> bool:
        if self.binding:
            raise ModeBranchError(self.owner)
        self.asked = True
        return False


def reads_others_mode(kind: type) -> bool:
    """Whether the code of a module type reads `training` of anything but self, which tracing would freeze."""
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(owner).items():
            code = getattr(_written(function), "__code__", None)
            if code is not None and name not in ("__init__", "train", "eval") and _reads_others_mode(code):
                return True
    return False


@cache
def _reads_others_mode(code: CodeType) -> bool:
    before = None
    for instruction in dis.get_instructions(code):
        reads = instruction.opname == "LOAD_ATTR" and instruction.argval == "training"
        if reads and (before is None or before.argval != "self"):
            return True
        before = instruction
    return False


def _written(function: Any) -> Any:
    """The function inside transformers' decorators, which ask for `self.training` only to checkpoint gradients."""
    while getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers."):
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    return function
