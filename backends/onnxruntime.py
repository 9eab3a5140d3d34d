"""ONNX Runtime on the CPU, and by its execution providers CUDA, TensorRT and OpenVINO."""

from __future__ import annotations

import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

from derc import providers, quantization, wheels
from derc.artifacts import Array
from derc.devices import cpu_name, describe_machine
from derc.engine import random_input
from derc.errors import DercError, IntegrityError, MissingDependencyError, UsageError
from derc.precision import rewrite
from derc.providers import Provider
from derc.store import Store
from derc.threads import cores, resolve

T = TypeVar("T")
WARM_UP = 3
"""Runs when a session is made: CUDA graphs are captured in the first ones, and threads on the CPU, which spin from the
beginning, sleep once a run has ended."""

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
    RuntimeError,
)
"""ONNX Runtime's own errors; a provider whose libraries are absent gives a plain RuntimeError."""


class OnnxSession:
    """A session whose input and output, one of each, stay bound to buffers in the provider's own memory."""

    def __init__(self, session: onnxruntime.InferenceSession, memory: str = "cpu") -> None:
        (source,), (sink,) = session.get_inputs(), session.get_outputs()
        self._session: onnxruntime.InferenceSession | None = session
        self._resident = memory != "cpu"
        self._input = random_input(tuple(source.shape))
        self._output = np.empty(sink.shape, np.float32)
        arrays = (self._input, self._output)
        self._buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(array, memory, 0) for array in arrays]
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(source.name, self._buffers[0])
        self._binding.bind_ortvalue_output(sink.name, self._buffers[1])
        for _ in range(WARM_UP if self._resident else 1):
            _guard("running the model", self._run)

    @property
    def _open(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise DercError("this session is closed")
        return self._session

    def _run(self) -> None:
        """One run, to its end: a device that works on its own is waited for."""
        self._open.run_with_iobinding(self._binding)
        if self._resident:
            self._binding.synchronize_outputs()

    def run(self, images: Array) -> Array:
        """Output for float32 `images` of exactly the shape that the engine was built for."""
        if self._open and images.shape != self._input.shape:
            raise UsageError(f"the engine takes inputs of shape {self._input.shape}, not {images.shape}")
        self._buffers[0].update_inplace(np.ascontiguousarray(images, np.float32))
        _guard("running the model", self._run)
        return np.array(self._buffers[1].numpy())

    def time(self) -> float:
        """Seconds of one run on the resident input; copies between host and device are not in it."""
        session, binding, resident = self._open, self._binding, self._resident
        try:
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            if resident:
                binding.synchronize_outputs()
            return time.perf_counter() - start
        except FAULTS as error:
            raise _fault("running the model", error) from error

    def placement(self) -> dict[str, int]:
        """Number of nodes by execution provider, as they were assigned, which is before the last fusions."""
        return placed(self._open)

    def close(self) -> None:
        """Release threads, weights and buffers."""
        self._session = None
        self._binding = None
        self._buffers.clear()


class OnnxRuntime:
    """Engine with fixed threads (0: the physical cores); the variant names the execution provider, "" is the CPU.

    Threads spin for work within a run and sleep between runs: sessions do not disturb each other, and small operators
    do not pay for waking a thread (without any spinning, small networks were 9 to 55% slower).
    """

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        self.variant = variant
        self.provider = providers.provider(variant)
        self.threads = resolve(threads)
        wheels.check_one(self.provider.wheel)
        check_available(self.provider, onnxruntime.get_available_providers())
        if self.provider.accelerator:
            self._probe()

    def _probe(self) -> None:
        """Raise MissingDependencyError where the provider's own libraries or its device are absent."""
        onnxruntime.set_default_logger_severity(4)  # what is wrong is in the error
        if self.provider.memory == "cuda":
            with redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        try:
            self.open(_smallest()).close()
        except DercError as error:
            raise MissingDependencyError(
                f"{self.provider.name} does not start on this machine ({error}): install its libraries and driver, "
                "or choose another engine"
            ) from error

    def describe(self) -> dict[str, str]:
        """Versions, provider, device and threads: a latency is valid for exactly these."""
        return {
            "engine": self.name,
            **({"variant": self.variant} if self.variant else {}),
            "onnxruntime": onnxruntime.__version__,
            "provider": self.provider.name,
            "threads": str(self.threads),
            "spinning": "within a run",
            "optimization": "all",
            **_device(self.provider),
            "cores": str(cores()),
            "machine": platform.machine(),
            "os": f"{platform.system()} {platform.release()}",
        }

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the provider has kernels for."""
        return self.provider.precisions

    def rewrite(self, model: bytes, precision: str, samples: Sequence[Array]) -> bytes:
        """The model with its insides in `precision`; see `derc.precision.rewrite`."""
        if precision not in self.precisions:
            raise UsageError(f"{self.provider.name} computes in {', '.join(self.precisions)}, not in {precision}")
        strict = self.provider.name == providers.TENSORRT
        return rewrite(model, precision, samples, quantization.TENSORRT if strict else quantization.for_cpu())

    def build(self, model: bytes, path: Path) -> None:
        """Optimise `model` for this device and write it to `path` in one step.

        A compiled provider's engine cannot be written: the model is, as it is, once the provider has taken it.
        """
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=self.suffix)
        os.close(handle)
        try:
            options = self._options()
            if self.provider.compiled:
                self._session(model, options)
                Path(name).write_bytes(model)
            else:
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
        if not self.provider.compiled:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            model = path.read_bytes()
            return OnnxSession(self._session(model, options), self.provider.memory)
        except OSError as error:
            raise IntegrityError(f"the engine {path} cannot be read: {error.strerror}") from error
        except DercError as error:
            raise IntegrityError(f"the engine {path} cannot be loaded: {error}") from error

    def open(self, model: bytes) -> OnnxSession:
        """Optimise `model` in memory and load it."""
        return OnnxSession(self._session(model, self._options()), self.provider.memory)

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self.provider.accelerator:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options

    def _session(self, model: bytes, options: onnxruntime.SessionOptions) -> Any:
        """A session whose every node is on the provider; raises DercError where one is not."""
        cache = _timing_cache() if self.provider.name == providers.TENSORRT else None
        wanted = [(self.provider.name, self.provider.options(self.threads, cache))]
        session = _guard(
            "loading the model",
            lambda: onnxruntime.InferenceSession(model, options, providers=wanted, enable_fallback=False),
        )
        check_placement(self.provider, session.get_providers(), placed(session))
        return session


def check_available(wanted: Provider, available: Sequence[str]) -> None:
    """Raise MissingDependencyError where this onnxruntime was built without the provider."""
    if wanted.name not in available:
        found = wheels.installed()
        swap = f"pip uninstall -y {' '.join(found)}, then pip install {wanted.wheel}" if found else ""
        raise MissingDependencyError(
            f"this onnxruntime has {', '.join(available)} and not {wanted.name}: "
            f"{swap or f'pip install {wanted.wheel}'}"
        )


def check_placement(wanted: Provider, active: Sequence[str], placement: dict[str, int]) -> None:
    """Raise DercError unless the provider is active and has every node.

    Shapes are static and folded before, so that not even shape arithmetic has a reason to stay on the CPU.
    """
    others = {name: count for name, count in placement.items() if name != wanted.name}
    if wanted.name not in active:
        raise DercError(f"onnxruntime fell back from {wanted.name} to {', '.join(active)}")
    if others:
        listed = ", ".join(f"{count} on {name}" for name, count in sorted(others.items()))
        raise DercError(f"onnxruntime left nodes off {wanted.name} ({listed}): choose another engine for this network")


def placed(session: Any) -> dict[str, int]:
    """Number of nodes by execution provider."""
    count: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        count[part.ep_name] = count.get(part.ep_name, 0) + len(part.get_nodes())
    return count


def _smallest() -> bytes:
    """A model of one ReLU."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 2, 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(made.SerializeToString())


def _device(wanted: Provider) -> dict[str, str]:
    """What computes: the processor, or the first GPU with its driver."""
    if wanted.memory == "cpu":
        return {"device": cpu_name()}
    machine = describe_machine(gpu=True)
    return {"device": machine.get("gpu", "unknown GPU"), "driver": machine.get("driver", "unknown")}


def _timing_cache() -> Path:
    folder = Store.default().root / "tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _guard(doing: str, work: Callable[[], T]) -> T:
    """`work()`, its faults turned into a DercError of one sentence."""
    try:
        return work()
    except FAULTS as error:
        raise _fault(doing, error) from error


def _fault(doing: str, error: Exception) -> DercError:
    return DercError(f"onnxruntime failed in {doing}: {str(error).strip().splitlines()[0]}")
