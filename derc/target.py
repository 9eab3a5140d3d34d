"""What the network will run on."""

from __future__ import annotations

from dataclasses import dataclass

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
            raise MissingDependencyError(
                f"target {name} needs an NVIDIA {name.upper()} with its driver and the GPU engines, and this machine cannot "
                f'serve it: run derc on the device after pip install "derc[gpu]", or compile for this machine with '
                f"--target cpu, or use --params-m or --macs-g, which need no device"
            )
        known = (*LOCAL, *GPUS)
        raise UsageError(f"unknown target {name!r}, known: {', '.join(known)}{suggest(name, known)}")
