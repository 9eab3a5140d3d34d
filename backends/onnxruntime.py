"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnxruntime
import psutil
from onnxruntime.capi import onnxruntime_pybind11_state as state

from derc.artifacts import Array
from derc.engine import random_input
from derc.errors import DercError, IntegrityError, MissingDependencyError, UsageError

T = TypeVar("T")

FAULTS = (
    state.EPFail,
    state.EngineError,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)


class OnnxSession:
    """A session whose input and output stay bound to their buffers, one of each."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        (source,), (sink,) = session.get_inputs(), session.get_outputs()
        self._session: onnxruntime.InferenceSession | None = session
        self._input = random_input(tuple(source.shape))
        self._output = np.empty(sink.shape, np.float32)
        self._buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (self._input, self._output)]
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(source.name, self._buffers[0])
        self._binding.bind_ortvalue_output(sink.name, self._buffers[1])

    @property
    def _open(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise DercError("this session is closed")
        return self._session

    def run(self, images: Array) -> Array:
        """Output for float32 `images` of exactly the shape that the engine was built for."""
        if images.shape != self._input.shape:
            raise UsageError(f"the engine takes inputs of shape {self._input.shape}, not {images.shape}")
        self._buffers[0].update_inplace(np.ascontiguousarray(images, np.float32))
        _guard("running the model", lambda: self._open.run_with_iobinding(self._binding))
        return np.array(self._buffers[1].numpy())

    def time(self) -> float:
        """Seconds of one run on the resident input."""
        session, binding = self._open, self._binding
        try:
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            return time.perf_counter() - start
        except FAULTS as error:
            raise _fault("running the model", error) from error

    def placement(self) -> dict[str, int]:
        """Number of nodes by execution provider, as they were assigned, which is before the last fusions."""
        count: dict[str, int] = {}
        for part in self._open.get_provider_graph_assignment_info():
            count[part.ep_name] = count.get(part.ep_name, 0) + len(part.get_nodes())
        return count

    def close(self) -> None:
        """Release threads, weights and buffers."""
        self._session = None
        self._binding = None
        self._buffers.clear()


class OnnxRuntime:
    """Engine on the CPU with fixed threads (0: the physical cores).

    Threads spin for work within a run and sleep between runs: sessions do not disturb each other, and small operators
    do not pay for waking a thread (without any spinning, small networks were 9 to 55% slower).
    """

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    provider: ClassVar[str] = "CPUExecutionProvider"

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        self.variant = variant
        if threads < 0:
            raise UsageError(f"the number of threads is {threads}, and must be 0 (physical cores) or more")
        self.threads = threads or _cores()

    def describe(self) -> dict[str, str]:
        """Versions, provider, device and threads: a latency is valid for exactly these."""
        return {
            "engine": self.name,
            "onnxruntime": onnxruntime.__version__,
            "provider": self.provider,
            "threads": str(self.threads),
            "spinning": "within a run",
            "optimization": "all",
            "device": _cpu_name(),
            "cores": str(_cores()),
            "machine": platform.machine(),
            "os": f"{platform.system()} {platform.release()}",
        }

    @property
    def precisions(self) -> tuple[str, ...]:
        """float32 alone."""
        return ("fp32",)

    def rewrite(self, model: bytes, precision: str, samples: Sequence[Array]) -> bytes:
        """The model as it is."""
        return model

    def build(self, model: bytes, path: Path) -> None:
        """Optimise `model` for this CPU and write it to `path` in one step."""
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=self.suffix)
        os.close(handle)
        try:
            options = self._options()
            options.optimized_model_filepath = name
            self._session(model, options)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            with suppress(FileNotFoundError):
                Path(name).unlink()

    def load(self, path: Path) -> OnnxSession:
        """Load what `build` wrote, as it is; raises IntegrityError where the file is missing or not a model."""
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            model = path.read_bytes()
            return OnnxSession(self._session(model, options))
        except OSError as error:
            raise IntegrityError(f"the engine {path} cannot be read: {error.strerror}") from error
        except DercError as error:
            raise IntegrityError(f"the engine {path} cannot be loaded: {error}") from error

    def open(self, model: bytes) -> OnnxSession:
        """Optimise `model` in memory and load it."""
        return OnnxSession(self._session(model, self._options()))

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _session(self, model: bytes, options: onnxruntime.SessionOptions) -> Any:
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise MissingDependencyError(
                f"this onnxruntime has {', '.join(available)} and not {self.provider}: reinstall it with "
                f'pip install "derc[cpu]"'
            )
        session = _guard(
            "loading the model", lambda: onnxruntime.InferenceSession(model, options, providers=[self.provider])
        )
        if session.get_providers() != [self.provider]:
            raise DercError(f"onnxruntime fell back from {self.provider} to {', '.join(session.get_providers())}")
        return session


def _guard(doing: str, work: Callable[[], T]) -> T:
    """`work()`, its faults turned into a DercError of one sentence."""
    try:
        return work()
    except FAULTS as error:
        raise _fault(doing, error) from error


def _fault(doing: str, error: Exception) -> DercError:
    return DercError(f"onnxruntime failed in {doing}: {str(error).strip().splitlines()[0]}")


def _cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
