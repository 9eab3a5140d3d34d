"""Importing what derc printed: a bundle's model.py, as its user would."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from safetensors.torch import save_file
from torch import nn

from derc.printing import Printed


def realise(printed: Printed) -> nn.Module:
    """Import the printed source with its weights, as a user would, and build the network."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.py").write_text(printed.source, encoding="utf-8")
        weights = {name: value.detach().clone().contiguous() for name, value in printed.weights.items()}
        save_file(weights, Path(folder, "weights.safetensors"))
        with imported(Path(folder, "model.py")) as module:
            network: nn.Module = module.build()
    return network


@contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """A module file under a private name, forgotten afterwards."""
    name = f"derc_emitted_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
