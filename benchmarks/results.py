"""How a benchmark ends: figures on the terminal, everything in a file, and where it ran."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import psutil
import torch

PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "derc")


def machine() -> dict[str, Any]:
    """Where this runs: processor, memory, the threads that torch has now, and the versions of what computes."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """The processor's model name where Linux says it, else what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def give(result: dict[str, Any], output: Path | None) -> None:
    """Print the result's figures, and write all of it to `output` where that is given."""
    click.echo(json.dumps(result["figures"], indent=1))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1), encoding="utf-8")
