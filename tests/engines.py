"""Engines for tests: ONNX Runtime with a fault that the model's producer name asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx

from derc import enginelock
from derc.backends.onnxruntime import OnnxRuntime
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
