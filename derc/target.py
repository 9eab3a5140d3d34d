"""What the network will run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from derc.errors import MissingDependencyError, UsageError, suggest

LOCAL = ("cpu",)
GPUS = ("t4", "l4", "a10", "a100", "h100", "h200", "orin")


@dataclass(frozen=True)
class Target:
    """A device with an engine; `threads` 0 means the physical cores, `batch` is the static batch size."""

    name: str
    engine: str = "onnxruntime"
    threads: int = 0
    batch: int = 1

    @classmethod
    def load(cls, name: str, *, threads: int = 0, batch: int = 1) -> Target:
        """The target called `name`.

        Raises UsageError for an unknown one, MissingDependencyError where this machine does not have the device.
        """
        if name in LOCAL:
            return cls(name, threads=threads, batch=batch)
        if name in GPUS:
            raise MissingDependencyError(_gpu_sentence(name))
        known = (*LOCAL, *GPUS)
        raise UsageError(f"unknown target {name!r}, known: {', '.join(known)}{suggest(name, known)}")


def _gpu_sentence(name: str) -> str:
    """What is missing for a GPU target on this machine, and what can be done."""
    remedy = (
        "compile for this machine's processor with --target cpu, or bound the size with --params-m or --macs-g there"
    )
    if not Path("/proc/driver/nvidia/version").exists():
        return f"target {name} needs an NVIDIA {name.upper()}, and this machine has no NVIDIA driver: {remedy}"
    return (
        f"target {name} needs an engine for NVIDIA GPUs, and this version of derc builds engines for cpu only: {remedy}"
    )
