"""OpenVINO on the CPU."""

from __future__ import annotations

import io
import logging
import platform
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx

from derc import precision as formats
from derc import threads as counting
from derc.artifacts import Array
from derc.engine import random_input
from derc.errors import DercError, IntegrityError, MissingDependencyError, PrecisionError, UsageError, suggest

T = TypeVar("T")
TELEMETRY = "openvino_telemetry"


@contextmanager
def _private() -> Iterator[None]:
    """Import without Intel's telemetry, which would leave files in the home folder and send them."""
    absent = object()
    before: Any = sys.modules.get(TELEMETRY, absent)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        if before is not absent:
            sys.modules[TELEMETRY] = before


with _private():
    import openvino

DEVICE = "CPU"
HINTS = {"": "f32", "bf16": "bf16"}
"""What floating-point insides are computed in, by variant; said always, for OpenVINO itself takes bf16 where it can."""
MEMBERS = ("model.xml", "model.bin")
NO_NODES = ("Const", "Input", "Output")
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ValueError)


@cache
def _core() -> openvino.Core:
    """One for the whole process, never released.

    The CPU plugin gives its thread an alternate signal stack, and unmaps it when it is unloaded; where two are unloaded
    in the order in which they were loaded, or one by another thread, the next handled signal finds no stack and the
    process dies (seen with 2026.4).
    """
    return openvino.Core()


class OpenVinoSession:
    """One inference request whose input and output stay bound to their buffers."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self._input = random_input(tuple(compiled.input(0).shape))
        self._output = np.empty(tuple(compiled.output(0).shape), np.float32)
        self._request.set_input_tensor(openvino.Tensor(self._input, shared_memory=True))
        self._request.set_output_tensor(openvino.Tensor(self._output, shared_memory=True))

    @property
    def _open(self) -> Any:
        if self._request is None:
            raise DercError("this session is closed")
        return self._request

    def run(self, images: Array) -> Array:
        """Output for float32 `images` of exactly the shape that the engine was built for."""
        request = self._open
        if images.shape != self._input.shape:
            raise UsageError(f"the engine takes inputs of shape {self._input.shape}, not {images.shape}")
        np.copyto(self._input, images)
        _guard("running the model", lambda: request.infer(share_outputs=True))
        return self._output.copy()

    def time(self) -> float:
        """Seconds of one run on the resident input."""
        request = self._open
        try:
            start = time.perf_counter()
            request.infer(share_outputs=True)
            return time.perf_counter() - start
        except RuntimeError as error:
            raise _fault("running the model", error) from error

    def placement(self) -> dict[str, int]:
        """Number of nodes of the graph that is executed, after all fusions, by device; constants are no nodes."""
        devices = list(self._open.get_compiled_model().get_property("EXECUTION_DEVICES"))
        if devices != [DEVICE]:
            raise DercError(f"OpenVINO runs the model on {', '.join(devices)} and not on {DEVICE} alone")
        return {DEVICE: sum(self.primitives().values())}

    def primitives(self) -> dict[str, int]:
        """Number of nodes by the kernel that computes them, such as ``brgconv_avx512_f32``."""
        _ = self._open
        kinds: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            told = node.get_rt_info()
            if told["layerType"].astype(str) not in NO_NODES:
                kinds[told["primitiveType"].astype(str)] += 1
        return dict(sorted(kinds.items()))

    def close(self) -> None:
        """Release threads, weights and buffers."""
        self._request = self._compiled = None


class OpenVino:
    """Engine on the CPU with fixed threads (0: the physical cores), one stream, one request, pinned to its cores.

    Variant ``bf16`` computes floating point in bfloat16; it is there where the processor has it.
    """

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".zip"

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        self.variant = variant
        self.threads = counting.resolve(threads)
        if variant not in HINTS:
            known = ", ".join(f"openvino:{name}" for name in HINTS if name)
            raise UsageError(f"unknown variant openvino:{variant}, known: openvino, {known}{suggest(variant, HINTS)}")
        self._core = _core()
        if variant == "bf16" and "BF16" not in self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
            raise MissingDependencyError(
                f"{self._device} does not compute in bfloat16: use openvino, or a processor with AVX512_BF16 or AMX"
            )
        if self.threads > counting.cores() and self._most_threads() < self.threads:
            raise MissingDependencyError(
                f"openvino runs {self._most_threads()} threads on this machine and not {self.threads}: ask for no more"
            )

    @property
    def precisions(self) -> tuple[str, ...]:
        """The variant's own floating point, and int8."""
        return (self.variant or "fp32", "int8")

    @property
    def _device(self) -> str:
        return str(self._core.get_property(DEVICE, "FULL_DEVICE_NAME")).strip()

    def describe(self) -> dict[str, str]:
        """Versions, device, threads and hints: a latency is valid for exactly these."""
        return {
            "engine": self.name,
            **({"variant": self.variant} if self.variant else {}),
            "openvino": openvino.__version__,
            "nncf": _version("nncf"),
            "device": self._device,
            "precision": HINTS[self.variant],
            "threads": str(self.threads),
            "streams": "1",
            "hint": "latency",
            "pinning": "yes",
            "cores": str(counting.cores()),
            "machine": platform.machine(),
            "os": f"{platform.system()} {platform.release()}",
        }

    def rewrite(self, model: bytes, precision: str, samples: Sequence[Array]) -> bytes:
        """The model with its insides quantised by NNCF, weights per channel and activations calibrated on `samples`.

        Equal arguments give equal bytes. Raises UsageError for an unknown precision and for int8 without samples,
        MissingDependencyError without NNCF, PrecisionError where the result is not finite on the samples.
        """
        if precision not in self.precisions:
            raise UsageError(f"{self.name} has no {precision!r} here, but {' and '.join(self.precisions)}")
        if precision != "int8":
            return model
        if not samples:
            raise UsageError("int8 needs samples to calibrate by: give a probe set of at least one image")
        nncf = _nncf()
        formats.check_range(model, samples, float(np.finfo(np.float32).max), precision)
        made = _quantised(nncf, model, samples)
        session = self.open(made)
        finite = all(np.isfinite(session.run(sample)).all() for sample in samples)
        session.close()
        if not finite:
            raise PrecisionError("the model gives NaN or infinity in int8: keep this block in floating point")
        return made

    def build(self, model: bytes, path: Path) -> None:
        """Write OpenVINO's own form of `model`, a ZIP of model.xml and model.bin, to `path` in one step.

        It is compiled once, so that what cannot run here fails here.
        """
        read = self._read(model)
        self._compile(read)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            xml = Path(folder, MEMBERS[0])
            _guard("saving the model", lambda: openvino.save_model(_named(read), xml, compress_to_fp16=False))
            packed = Path(folder, path.name)
            with zipfile.ZipFile(packed, "w") as archive:
                for name in MEMBERS:
                    archive.writestr(zipfile.ZipInfo(name), Path(folder, name).read_bytes())
            packed.replace(path)

    def load(self, path: Path) -> OpenVinoSession:
        """Load what `build` wrote; raises IntegrityError where it is missing, damaged or no such engine."""
        try:
            with zipfile.ZipFile(path) as archive:
                if sorted(archive.namelist()) != sorted(MEMBERS):
                    raise IntegrityError(
                        f"the engine {path} cannot be loaded: it does not hold {' and '.join(MEMBERS)}"
                    )
                xml, weights = (archive.read(name) for name in MEMBERS)
        except OSError as error:
            raise IntegrityError(f"the engine {path} cannot be read: {error.strerror or error}") from error
        except BROKEN as error:
            raise IntegrityError(
                f"the engine {path} cannot be loaded: it is damaged or no such engine ({error})"
            ) from error
        try:
            read = _guard("reading the engine", lambda: self._core.read_model(xml, weights))
            return OpenVinoSession(self._compile(read))
        except DercError as error:
            raise IntegrityError(f"the engine {path} cannot be loaded: {error}") from error

    def open(self, model: bytes) -> OpenVinoSession:
        """Compile `model` in memory."""
        return OpenVinoSession(self._compile(self._read(model)))

    def _most_threads(self) -> int:
        """Threads that OpenVINO really takes where `threads` are asked for: it says nothing of taking fewer."""
        x = openvino.opset13.parameter([1], np.float32)
        tiny = openvino.Model([openvino.opset13.relu(x)], [x], "tiny")
        return int(self._compile(tiny).get_property("INFERENCE_NUM_THREADS"))

    def _read(self, model: bytes) -> openvino.Model:
        return _guard("reading the model", lambda: self._core.read_model(model))

    def _compile(self, model: openvino.Model) -> openvino.CompiledModel:
        if len(model.inputs) != 1 or len(model.outputs) != 1 or model.is_dynamic():
            raise DercError("openvino takes models with one input, one output and fixed shapes: export it so")
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.variant],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": True,
        }
        return _guard("compiling the model", lambda: self._core.compile_model(model, DEVICE, options))


def _named(model: openvino.Model) -> openvino.Model:
    """The model with its made-up names, which count on within a process, replaced by names that are always the same."""
    for place, op in enumerate(model.get_ordered_ops()):
        if op.get_friendly_name() == op.get_name():
            op.set_friendly_name(f"{op.get_type_name()}-{place}")
    return model


def _quantised(nncf: Any, model: bytes, samples: Sequence[Array]) -> bytes:
    proto = onnx.load_from_string(model)
    name = proto.graph.input[0].name
    attention = any(node.op_type == "Softmax" for node in proto.graph.node)
    with _quiet():
        try:
            made = nncf.quantize(
                proto,
                nncf.Dataset(list(samples), lambda sample: {name: sample}),
                subset_size=len(samples),
                model_type=nncf.ModelType.TRANSFORMER if attention else None,
            )
        except Exception as error:  # NNCF and the runtime below it raise errors of many kinds
            raise _fault("quantising the model with NNCF", error) from error
    return bytes(made.SerializeToString(deterministic=True))


def _nncf() -> Any:
    """NNCF, imported without a trace: no telemetry, no chatter, no logger class of its own for everybody."""
    kind = logging.getLoggerClass()
    try:
        with _private(), _quiet():
            import nncf
            import onnxruntime  # noqa: F401  what NNCF runs ONNX models with
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"int8 for openvino is made by NNCF and ONNX Runtime, and {error.name} is not installed: "
            'pip install "derc[openvino,cpu]"'
        ) from error
    finally:
        logging.setLoggerClass(kind)
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice off the terminal; errors are exceptions and pass."""
    before = logging.root.manager.disable
    drain = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(drain), redirect_stderr(drain), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _guard(doing: str, work: Callable[[], T]) -> T:
    """`work()`, its faults turned into a DercError of one sentence."""
    try:
        return work()
    except RuntimeError as error:
        raise _fault(doing, error) from error


def _fault(doing: str, error: Exception) -> DercError:
    """The error with the one line that says what is wrong; OpenVINO puts places in its own source before that."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API", "Summary"))]
    detailed = [line for line in telling if line.startswith(("No conversion", "Incompatible"))]
    line = next(iter(detailed or telling or lines), type(error).__name__)
    return DercError(f"openvino failed in {doing}: {line}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
