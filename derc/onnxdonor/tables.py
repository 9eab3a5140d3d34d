"""The table of operators that have a PyTorch form: name → function of builder and operator."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from derc.onnxdonor.builder import Builder
from derc.onnxdonor.values import Operator

Made = fx.Node | list[fx.Node]
Handler = Callable[[Builder, Operator], Made]
OPERATORS: dict[str, Handler] = {}


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Enter a function into the table."""

    def enter(handler: Handler) -> Handler:
        for name in names:
            OPERATORS[name] = handler
        return handler

    return enter
