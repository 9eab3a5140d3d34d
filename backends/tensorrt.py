"""TensorRT 11 on the first NVIDIA GPU: strongly typed plans, run from a CUDA graph, with their lock beside them."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch

from derc import enginelock, precision, quantization
from derc.artifacts import Array
from derc.devices import describe_machine
from derc.engine import random_input
from derc.errors import BuildError, DercError, IntegrityError, MissingDependencyError, UsageError
from derc.store import Store
from derc.threads import resolve

MAJOR = 11
INSTALL = 'pip install "derc[gpu]"'
WARM_UP = 3
"""Runs before a CUDA graph is captured: the first ones still allocate."""


@dataclass(frozen=True)
class PlanOptions:
    """What the builder is told; `workspace_gb` (2³⁰ bytes) bounds the memory that layers may work in.

    Refitting, version compatibility and hardware compatibility stay off: each costs speed, and a plan is built where it
    runs. TF32 is off, so that fp32 means float32.
    """

    optimization_level: int = 3
    workspace_gb: int = 4
    tf32: bool = False


class PlanSession:
    """An execution context whose one input and one output stay in GPU memory, captured in a CUDA graph."""

    def __init__(self, engine: Any, trt: Any) -> None:
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise IntegrityError("the plan has not one input and one output: it is none of derc's")
        self._layers = int(engine.num_layers)
        self._shape = tuple(engine.get_tensor_shape(inputs[0]))
        self._input = torch.from_numpy(random_input(self._shape)).cuda()
        self._output = torch.empty(tuple(engine.get_tensor_shape(outputs[0])), device="cuda")
        self._context = engine.create_execution_context()
        self._context.set_tensor_address(inputs[0], self._input.data_ptr())
        self._context.set_tensor_address(outputs[0], self._output.data_ptr())
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        for _ in range(WARM_UP):
            self._enqueue()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue()
        return graph

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise DercError("TensorRT failed in running the plan: build the engine anew on this machine")

    @property
    def _open(self) -> torch.cuda.CUDAGraph:
        if self._graph is None:
            raise DercError("this session is closed")
        return self._graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.stream(self._stream):
            graph.replay()
        self._stream.synchronize()

    def run(self, images: Array) -> Array:
        """Output for float32 `images` of exactly the shape that the engine was built for, copied in and out."""
        graph = self._open
        if images.shape != self._shape:
            raise UsageError(f"the engine takes inputs of shape {self._shape}, not {images.shape}")
        self._input.copy_(torch.from_numpy(np.ascontiguousarray(images, np.float32)))
        torch.cuda.current_stream().synchronize()
        self._replay(graph)
        found: Array = self._output.cpu().numpy()
        return found

    def time(self) -> float:
        """Seconds of one run on the resident input, until the GPU is done, without copies from or to the host."""
        graph = self._open
        start = time.perf_counter()
        self._replay(graph)
        return time.perf_counter() - start

    def placement(self) -> dict[str, int]:
        """All layers of the plan: TensorRT has no other place for them."""
        return {"TensorRT": self._layers if self._open else 0}

    def close(self) -> None:
        """Release the graph, the context and the buffers."""
        self._graph = None
        self._context = None
        self._input = self._output = torch.empty(0)


class TensorRt:
    """Engine on the first GPU that this process sees; `threads` is what the host may use, and changes nothing."""

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".plan"

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        if variant:
            raise UsageError(f"tensorrt has no variant {variant!r}: write tensorrt alone")
        self.variant = variant
        self.threads = resolve(threads)
        self.options = PlanOptions()
        self._trt = library()
        check_gpu()
        self._log = _logger(self._trt)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The formats that TensorRT has kernels for on every GPU that it supports; bf16 from Ampere on."""
        halves = ("fp16", "bf16") if torch.cuda.get_device_capability(0) >= (8, 0) else ("fp16",)
        return ("fp32", *halves, "int8")

    def describe(self) -> dict[str, str]:
        """Versions, device, driver and builder options: a latency is valid for exactly these."""
        major, minor = torch.cuda.get_device_capability(0)
        machine = describe_machine(gpu=True)
        return {
            "engine": self.name,
            "tensorrt": str(self._trt.__version__),
            "cuda": str(torch.version.cuda),
            "device": torch.cuda.get_device_name(0),
            "compute_capability": f"{major}.{minor}",
            "driver": machine.get("driver", "unknown"),
            "cuda_graph": "yes",
            "options": " ".join(f"{name}={value}" for name, value in asdict(self.options).items()),
            "machine": machine.get("machine", "unknown"),
            "os": machine.get("os", "unknown"),
        }

    def rewrite(self, model: bytes, wanted: str, samples: Sequence[Array]) -> bytes:
        """The model with its insides in `wanted`; a strongly typed network computes what its types say."""
        if wanted not in self.precisions:
            raise UsageError(f"tensorrt computes in {', '.join(self.precisions)} on this GPU, not in {wanted}")
        return precision.rewrite(model, wanted, samples, quantization.TENSORRT)

    def build(self, model: bytes, path: Path) -> None:
        """Write the plan of `model` to `path`, and its lock beside it."""
        plan = self._plan(model)
        enginelock.write(plan, path, self._lock(plan, model))

    def load(self, path: Path) -> PlanSession:
        """Load what `build` wrote, once its lock admits it; see `enginelock.read`."""
        return self._session(enginelock.read(path, self.describe()), str(path))

    def open(self, model: bytes) -> PlanSession:
        """Build a plan in memory and load it."""
        return self._session(self._plan(model), "the plan")

    def _lock(self, plan: bytes, model: bytes) -> enginelock.EngineLock:
        options = {name: str(value) for name, value in asdict(self.options).items()}
        formats = "+".join(precision.used(onnx.load_from_string(model)))
        return enginelock.lock(plan, self.describe(), formats, options)

    def _plan(self, model: bytes) -> bytes:
        trt = self._trt
        builder = self._builder()
        network = builder.create_network()
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(model):
            why = "; ".join(parser.get_error(place).desc() for place in range(parser.num_errors))
            raise BuildError(f"TensorRT cannot parse the model: {_line(why)}: leave out the donor with this operator")
        config = self._config(builder)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"TensorRT failed in building the engine: {_line(self._log.last)}")
        self._keep_timings(bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _builder(self) -> Any:
        try:
            return self._trt.Builder(self._log)
        except TypeError as error:  # what the bindings make of a null pointer
            raise MissingDependencyError(
                f"TensorRT cannot use this GPU ({_line(self._log.last)}): {INSTALL}"
            ) from error

    def _config(self, builder: Any) -> Any:
        trt = self._trt
        config = builder.create_builder_config()
        config.builder_optimization_level = self.options.optimization_level
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.options.workspace_gb * 2**30)
        if not self.options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        known = self._timings.read_bytes() if self._timings.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return config

    @property
    def _timings(self) -> Path:
        """Timings of layers on this device by this version, which make later builds quicker."""
        described = self.describe()
        key = "-".join(described[name] for name in enginelock.bound(described)).replace(" ", "_").replace("/", "_")
        return Store.default().root / "tensorrt" / f"{key}.timings"

    def _keep_timings(self, data: bytes) -> None:
        path = self._timings
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        finally:
            with suppress(FileNotFoundError):
                Path(name).unlink()

    def _session(self, plan: bytes, name: str) -> PlanSession:
        engine = self._trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if engine is None:
            raise IntegrityError(f"{name} cannot be deserialised ({_line(self._log.last)}): {enginelock.REBUILD}")
        return PlanSession(engine, self._trt)


def library() -> Any:
    """The `tensorrt` package; raises MissingDependencyError where it, its libraries or the right version is absent."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:  # ModuleNotFoundError, and bindings whose libraries are not there
        raise MissingDependencyError(
            f"the engine tensorrt needs TensorRT {MAJOR} ({_line(str(error))}): {INSTALL}"
        ) from error
    version = str(getattr(trt, "__version__", "unknown"))
    if version.partition(".")[0] != str(MAJOR):
        raise MissingDependencyError(f"the engine tensorrt needs TensorRT {MAJOR}, and this is {version}: {INSTALL}")
    return trt


def check_gpu() -> None:
    """Raise MissingDependencyError where torch, which holds the buffers, sees no NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            "the engine tensorrt needs an NVIDIA GPU that torch can use, and there is none: "
            "build on a machine that has one, with `derc build`"
        )


def _logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps the last error as `last`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.last = "TensorRT gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = message

    return Log()


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
