"""derc: the Deep Reassembly Compiler. Importing it loads neither torch nor a runtime."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from derc.version import VERSION

# ONNX Runtime looks at it when it is first imported: without, that alone writes to the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = VERSION
__all__ = ["Data", "DercError", "Target", "Zoo", "compile", "load", "lower"]

_WHERE = {
    "Data": "derc.data",
    "DercError": "derc.errors",
    "Target": "derc.target",
    "Zoo": "derc.zoo",
    "compile": "derc.api",
    "load": "derc.api",
    "lower": "derc.api",
}

if TYPE_CHECKING:
    from derc.api import compile, load, lower
    from derc.data import Data
    from derc.errors import DercError
    from derc.target import Target
    from derc.zoo import Zoo


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'derc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
