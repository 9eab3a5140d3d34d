"""AOTInductor: PyTorch's own compiler, ahead of time, on the CPU or, with CUDA graphs, on an NVIDIA GPU."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from derc import precision as formats
from derc import threads as counting
from derc.artifacts import Array
from derc.devices import cpu_name
from derc.engine import random_input
from derc.errors import DercError, IntegrityError, MissingDependencyError, UsageError, suggest
from derc.onnxdonor.fixed import module

Runner = Callable[[list[torch.Tensor]], list[torch.Tensor]]
VARIANTS = {"": "cpu", "cuda": "cuda"}
NOTE = "derc"
"""Under this name the package's metadata keeps what it was built from and for."""
LIBRARY_CALL = re.compile(r"\baoti_torch_(cpu|cuda)_\w+\(")
CPU_KERNEL = re.compile(r"^(?!.*\bvoid\b)\s*cpp_\w+\(", re.MULTILINE)
GPU_KERNEL = re.compile(r"^(?!.*\bvoid\b)\s*(?:call_triton_\w+|launchKernel)\(", re.MULTILINE)
VERSION = re.compile(r"(?:gcc|clang) version ([\d.]+)")
WARM_UP = 3
"""Runs before a CUDA graph is captured: libraries allocate their workspaces in the first ones."""
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ValueError)


class InductorSession:
    """A loaded package and its own input, on the device."""

    def __init__(self, run: Runner, shape: tuple[int, ...], threads: int, placement: dict[str, int]) -> None:
        self._run: Runner | None = run
        self._threads, self._placement = threads, placement
        self._input = torch.from_numpy(random_input(shape))

    @property
    def _open(self) -> Runner:
        if self._run is None:
            raise DercError("this session is closed")
        return self._run

    def run(self, images: Array) -> Array:
        """Output for float32 `images` of exactly the shape that the engine was built for."""
        self._open  # noqa: B018  a closed session is the first thing to say
        if images.shape != tuple(self._input.shape):
            raise UsageError(f"the engine takes inputs of shape {tuple(self._input.shape)}, not {images.shape}")
        self._input.copy_(torch.from_numpy(np.ascontiguousarray(images, np.float32)))
        with _threads(self._threads), _faults("running the model"):
            return np.array(self._once().cpu().numpy())

    def time(self) -> float:
        """Seconds of one run on the resident input."""
        self._open  # noqa: B018
        with _threads(self._threads), _faults("running the model"):
            start = time.perf_counter()
            self._once()
            return time.perf_counter() - start

    def placement(self) -> dict[str, int]:
        """Number of kernels and library calls that one run makes, by device."""
        self._open  # noqa: B018
        return dict(self._placement)

    def close(self) -> None:
        """Unload the package and release its weights and buffers."""
        self._run = None
        self._input = torch.empty(0)

    def _once(self) -> torch.Tensor:
        return self._open([self._input])[0]


class CudaSession(InductorSession):
    """The same on a GPU: one run replays a CUDA graph on buffers that stay there; copies are outside of `time`."""

    def __init__(self, run: Runner, shape: tuple[int, ...], threads: int, placement: dict[str, int]) -> None:
        super().__init__(run, shape, threads, placement)
        if set(placement) != {"cuda"}:
            raise DercError(f"inductor left kernels of this model on the CPU ({placement}): use another engine")
        self._input = self._input.cuda()
        self._graph: Any = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run([self._input])
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self._output: torch.Tensor = run([self._input])[0]

    def close(self) -> None:
        """Unload the package and release graph, weights and buffers."""
        super().close()
        self._graph = None
        self._output = torch.empty(0)

    def _once(self) -> torch.Tensor:
        self._graph.replay()
        torch.cuda.synchronize()
        return self._output


class Inductor:
    """Engine that compiles with AOTInductor for fixed threads (0: the physical cores), constants folded and prepacked.

    Variant ``cuda`` compiles for the first NVIDIA GPU.
    """

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".pt2"

    def __init__(self, threads: int = 0, variant: str = "") -> None:
        self.variant = variant
        self.threads = counting.resolve(threads)
        if variant not in VARIANTS:
            known = ", ".join(f"inductor:{name}" for name in VARIANTS if name)
            raise UsageError(
                f"unknown variant inductor:{variant}, known: inductor, {known}{suggest(variant, VARIANTS)}"
            )
        self._compiler = _compiler()
        if self._kind == "cuda" and not torch.cuda.is_available():
            raise MissingDependencyError(
                f"torch {torch.__version__} finds no NVIDIA GPU for inductor:cuda: use inductor, or a machine with one"
            )

    @property
    def _kind(self) -> str:
        return VARIANTS[self.variant]

    @property
    def precisions(self) -> tuple[str, ...]:
        """float32; bf16 where the device computes in it, on a GPU fp16 too."""
        if self._kind == "cuda":
            return ("fp32", "fp16", "bf16") if torch.cuda.is_bf16_supported() else ("fp32", "fp16")
        return ("fp32", "bf16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("fp32",)

    def describe(self) -> dict[str, str]:
        """Versions, compiler, device and threads: a latency is valid for exactly these."""
        return {
            "engine": self.name,
            **({"variant": self.variant} if self.variant else {}),
            "torch": torch.__version__,
            "compiler": self._compiler,
            "freezing": "yes",
            "waiting": os.environ.get("OMP_WAIT_POLICY", "default"),
            **(_gpu() if self._kind == "cuda" else {"device": cpu_name()}),
            "threads": str(self.threads),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": str(counting.cores()),
            "machine": platform.machine(),
            "os": f"{platform.system()} {platform.release()}",
        }

    def rewrite(self, model: bytes, precision: str, samples: Sequence[Array]) -> bytes:
        """The model with its insides in fp16 or bf16; see `derc.precision.rewrite`.

        Raises UsageError for a precision that is not one of `precisions`.
        """
        if precision not in self.precisions:
            raise UsageError(f"{self.name} has no {precision!r} here, but {' and '.join(self.precisions)}")
        return formats.rewrite(model, precision, samples)

    def build(self, model: bytes, path: Path) -> None:
        """Compile `model`, its weights included, for this device and these threads; write it to `path` in one step."""
        network, shape = module(model)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            packed = Path(folder, "engine.pt2")
            with _quiet(), _threads(self.threads), _faults("compiling the model"):
                self._compile(network, shape, Path(folder), packed)
            packed.replace(path)

    def load(self, path: Path) -> InductorSession:
        """Load what `build` wrote. The file is a program that this process then runs.

        So it is called for engines only that were built here or whose digest the bundle's manifest holds. Raises
        IntegrityError where the file is missing, damaged, or was built for another torch, device or number of threads.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                if damaged is not None:
                    raise IntegrityError(f"the engine {path} cannot be loaded: its part {damaged} is damaged")
                note, placement = _note(archive), _placement(archive)
        except OSError as error:
            raise IntegrityError(f"the engine {path} cannot be read: {error.strerror or error}") from error
        except BROKEN as error:
            raise IntegrityError(
                f"the engine {path} cannot be loaded: it is damaged or no such engine ({error})"
            ) from error
        for what, here in self._stamp().items():
            if note.get(what) != here:
                raise IntegrityError(f"the engine {path} is for {what} {note.get(what)}, not {here}: build it again")
        with _quiet(), _threads(self.threads), _faults(f"loading the engine {path}"):
            loaded = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
            kind = CudaSession if self._kind == "cuda" else InductorSession
            return kind(loaded.loader.run, tuple(note["shape"]), self.threads, placement)

    def open(self, model: bytes) -> InductorSession:
        """Compile `model` into a folder of its own and load it."""
        with tempfile.TemporaryDirectory(prefix="derc.inductor.") as folder:
            path = Path(folder, "engine.pt2")
            self.build(model, path)
            return self.load(path)

    def _stamp(self) -> dict[str, str]:
        told = self.describe()
        return {name: told[name] for name in ("torch", "device", "threads")}

    def _compile(self, network: torch.nn.Module, shape: tuple[int, ...], folder: Path, packed: Path) -> None:
        from torch._inductor.package.package import package_aoti

        network, example = network.to(self._kind), torch.zeros(shape, device=self._kind)
        options = {
            "freezing": True,
            "cpp.threads": self.threads,
            "compile_threads": 1,
            "aot_inductor.package": True,
            "aot_inductor.output_path": str(folder / "parts"),
            "aot_inductor.metadata": {NOTE: json.dumps(self._stamp() | {"shape": shape})},
        }
        with torch.no_grad():
            program = torch.export.export(network, (example,))
            files: Any = torch._inductor.aot_compile(program.module(), (example,), options=options)
        package_aoti(str(packed), files)


def _note(archive: zipfile.ZipFile) -> dict[str, Any]:
    """What `build` wrote about the package."""
    note: dict[str, Any] = json.loads(json.loads(_part(archive, "wrapper_metadata.json"))[NOTE])
    return note


def _part(archive: zipfile.ZipFile, ending: str) -> bytes:
    names = [name for name in archive.namelist() if name.endswith(ending)]
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} parts *{ending}")
    return archive.read(names[0])


def _placement(archive: zipfile.ZipFile) -> dict[str, int]:
    """Kernels and library calls by device, as the package's own source has them."""
    source = _part(archive, "wrapper.cpp").decode()
    count = Counter(LIBRARY_CALL.findall(source))
    count["cpu"] += len(CPU_KERNEL.findall(source))
    count["cuda"] += len(GPU_KERNEL.findall(source))
    return {device: number for device, number in sorted(count.items()) if number}


def _compiler() -> str:
    """The C++ compiler with its version; raises MissingDependencyError where there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        name = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise MissingDependencyError(
            "inductor compiles with a C++ compiler and finds none: install g++, or name one in the variable CXX"
        ) from error
    told = VERSION.search(cpp_builder.get_compiler_version_info(name))
    return f"{name} {told[1] if told else 'of unknown version'}"


def _gpu() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "compute_capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda),
        "cuda_graphs": "yes",
        "tf32": f"convolutions {torch.backends.cudnn.allow_tf32}, matrices {torch.backends.cuda.matmul.allow_tf32}",
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run torch with this many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's advice off the terminal; errors are exceptions and pass."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _faults(doing: str) -> Iterator[None]:
    """Turn torch's faults into a DercError of one sentence."""
    try:
        yield
    except DercError:
        raise
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DercError(f"inductor failed in {doing}: {lines[0] if lines else type(error).__name__}") from error
