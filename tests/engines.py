"""Engines for tests: ONNX Runtime with faults that a model's producer name asks for, or with a precision of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter

from derc import enginelock
from derc.backends.onnxruntime import OnnxRuntime, OnnxSession
from derc.errors import PrecisionError


def asking(model: bytes, fault: str, note: Path | None = None) -> bytes:
    """`model` with the name of a fault where `Faulty` looks for it, which writes process ids to `note`."""
    proto = onnx.load_from_string(model)
    proto.producer_name, proto.producer_version = fault, str(note or "")
    return proto.SerializeToString()


class OwnPrecisionError(PrecisionError):
    """A plug-in's own error, which derc does not know."""


class Faulty(OnnxRuntime):
    """Does what it is asked for, then builds: crashes, hangs, grows, raises, prints, starts a process, reads stdin."""

    def build(self, model: bytes, path: Path) -> None:
        proto = onnx.load_from_string(model)
        if hasattr(self, f"_{proto.producer_name}"):
            path.write_bytes(b"half an engine")
            getattr(self, f"_{proto.producer_name}")(Path(proto.producer_version))
        super().build(model, path)
        if proto.producer_name == "locked":
            enginelock.place(path).write_text("a lock")

    def _crash(self, note: Path) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def _killed(self, note: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _hang(self, note: Path) -> None:
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note.write_text(f"{os.getpid()} {other.pid}")
        time.sleep(600)

    def _forked_crash(self, note: Path) -> None:
        other = os.fork()
        if other == 0:
            time.sleep(600)
        note.write_text(f"{os.getpid()} {other}")
        os.kill(os.getpid(), signal.SIGABRT)

    def _grow(self, note: Path) -> None:
        kept = []
        while True:
            kept.append(bytearray(os.urandom(1024)) * 20_000)
            time.sleep(0.01)

    def _bulge(self, note: Path) -> None:
        """Keep what is a lot, but allowed."""
        self.kept = bytearray(os.urandom(1024)) * 500_000

    def _raises(self, note: Path) -> None:
        raise OwnPrecisionError("block r[0:1] overflows in fp16: use bf16")

    def _invalid(self, note: Path) -> None:
        super().open(b"no model")

    def _bug(self, note: Path) -> None:
        raise ZeroDivisionError("a bug of the runtime's")

    def _chatter(self, note: Path) -> None:
        os.write(1, b"{}\n[W] the runtime talks\n" * 10)
        print("and so does its Python part")

    def _ask(self, note: Path) -> None:
        assert sys.stdin.read() == "" and os.read(0, 1) == b""

    def _tell(self, note: Path) -> None:
        note.write_text(str(os.getpid()))


class Absent(OnnxRuntime):
    """Cannot be made in a child."""

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        super().__init__(threads, variant)
        if "derc.buildworker" in sys.argv[0] or sys.argv[0].endswith("buildworker.py"):
            raise PrecisionError("no such device: plug one in")


class Rounding(OnnxRuntime):
    """Rounds weights to 8 bits, and keeps what it was given to calibrate by; `broken` weights are NaN instead."""

    broken = False

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        super().__init__(threads, variant)
        self.seen: list[tuple[str, list[np.ndarray]]] = []

    @property
    def precisions(self) -> tuple[str, ...]:
        return "fp32", "int8", "bf16"

    def rewrite(self, model: bytes, precision: str, samples: Sequence[np.ndarray]) -> bytes:
        """The real thing for a test: other weights, and for bf16 a newer operator set."""
        self.seen.append((precision, list(samples)))
        proto = onnx.load_from_string(model)
        for weight in proto.graph.initializer:
            if weight.data_type == onnx.TensorProto.FLOAT:
                weight.CopyFrom(onnx.numpy_helper.from_array(self._rounded(weight), weight.name))
        if precision == "bf16":
            proto = onnx.version_converter.convert_version(onnx.inliner.inline_local_functions(proto), 22)
        return proto.SerializeToString()

    def _rounded(self, weight: onnx.TensorProto) -> np.ndarray:
        values = onnx.numpy_helper.to_array(weight)
        step = np.abs(values).max(initial=1e-9) / 127
        return np.full_like(values, np.nan) if self.broken else (np.round(values / step) * step).astype(np.float32)


class Wrong(Rounding):
    """Builds right engines, and gives their answers the wrong sign."""

    def load(self, path: Path) -> OnnxSession:
        """A session that answers wrong."""
        session = super().load(path)
        right = session.run
        session.run = lambda images: -right(images)
        return session


class Refusing(Rounding):
    """Computes one block alone in int8, and no second one."""

    def rewrite(self, model: bytes, precision: str, samples: Sequence[np.ndarray]) -> bytes:
        """Raises PrecisionError for a block that takes no images."""
        if samples[0].shape[1:] != (3, 32, 32):
            raise PrecisionError("the block overflows in int8: keep it in fp32")
        return super().rewrite(model, precision, samples)
