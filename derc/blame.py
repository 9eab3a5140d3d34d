"""Which module and which line of a donor's own code is to blame."""

from __future__ import annotations

import linecache
import sys
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from derc.errors import UsageError

OURS = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parent), "<")
"""Where code lies that is not the donor's: torch, derc, and what is compiled from strings."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HARMLESS = (SpectralNorm, WeightNorm)
"""Hooks that only make a module's own weight."""


def here() -> str:
    """File and line of the donor's code that runs now, "" where there is none."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(OURS):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def place(error: BaseException, failed: tuple[str, str] | None, root: nn.Module) -> str:
    """A clause that names the module (path and type) and the line of the donor's code that an error came from."""
    path, kind = failed or ("", type(root).__name__)
    module = f"in {kind} at {path}" if path else f"in {kind}"
    first = error.__cause__ or error
    frames = [f for f in traceback.extract_tb(first.__traceback__) if not f.filename.startswith(OURS)]
    if not frames:
        return f" ({module})"
    last = frames[-1]
    code = linecache.getline(last.filename, last.lineno or 0).strip()
    return f" ({module}, {last.filename}:{last.lineno}: {code})"


def check_hooks(module: nn.Module, path: str) -> None:
    """Raise UsageError where a module has hooks: what they do is not in the graph, and blocks would lose it."""
    for kind in HOOKS:
        for hook in getattr(module, kind).values():
            if isinstance(hook, HARMLESS):
                continue
            code = getattr(hook, "__code__", None)
            where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
            raise UsageError(
                f"module {path or type(module).__name__} has the hook {getattr(hook, '__qualname__', hook)}{where}: "
                "remove hooks before lowering, blocks would not run them together"
            )
