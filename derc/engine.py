"""What an engine is: a runtime that builds a deployable artifact from ONNX, runs it and says where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from derc.artifacts import Array

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"""Number formats that a block may be computed in; its input and output are float32 always."""


class Session(Protocol):
    """A loaded engine, ready to run; its buffers stay allocated, so `run` is what a server would pay per call."""

    def run(self, images: Array) -> Array:
        """Output for float32 `images` (N, C, H, W); N is the batch size that the engine was built for."""

    def time(self) -> float:
        """Seconds of one run on the session's own resident input."""

    def placement(self) -> dict[str, int]:
        """Number of nodes by execution provider: what really runs where."""

    def close(self) -> None:
        """Release threads and memory."""


class Engine(Protocol):
    """A runtime on this machine, made with `Class(threads=0, variant="")`.

    A variant is a way to use one runtime, named after a colon: ``onnxruntime:cuda``, ``openvino:bf16``. What this
    machine cannot do raises MissingDependencyError when the engine is made, never later and never silently.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    """File name ending of what `build` writes, such as ``.onnx``."""
    variant: str
    threads: int
    """Of the processor, at least 1."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What a block's insides may be computed in here, of `PRECISIONS`; the engine's own first."""

    def describe(self) -> dict[str, str]:
        """Everything about runtime and device that can change a latency: versions, provider, device, threads.

        `engine` is the name, `variant` is there where there is one.
        """

    def rewrite(self, model: bytes, precision: str, samples: Sequence[Array]) -> bytes:
        """The ONNX `model` (one float32 input and output, which stay so) with its insides computed in `precision`.

        `samples` are inputs of the model's own shape, to calibrate int8 by. Raises PrecisionError where the result
        would hold NaN or overflow.
        """

    def build(self, model: bytes, path: Path) -> None:
        """Optimise the ONNX `model` for this device and write the engine to `path` atomically."""

    def load(self, path: Path) -> Session:
        """Load what `build` wrote."""

    def open(self, model: bytes) -> Session:
        """Build in memory and load, for measuring a block without keeping its engine."""


def random_input(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Standard normal float32 input of `shape`, batch axis included."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def parse(spec: str) -> tuple[str, str]:
    """Name and variant of an engine written ``name`` or ``name:variant``."""
    name, _, variant = spec.partition(":")
    return name, variant
