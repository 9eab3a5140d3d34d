"""What this machine is: its processor, its GPUs, and the settings of both that can change a latency."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process can use: `capability` as ``8.0``, memory in GB; `partitioned` where it is a MIG part."""

    name: str
    capability: str
    memory_gb: float
    partitioned: bool = False


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs as torch sees them, which is what this process may use; by NVML where torch has no CUDA."""
    import torch

    if torch.version.cuda is None:
        return _by_nvml()
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(Gpu(p.name, f"{p.major}.{p.minor}", p.total_memory / 1e9, " MIG " in f" {p.name} ") for p in found)


def _by_nvml() -> tuple[Gpu, ...]:
    nvml = _nvml()
    if nvml is None:
        return ()
    try:
        return tuple(_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount()))
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    partitioned = False
    with suppress(nvml.NVMLError):  # what has no MIG says so by an error
        partitioned = nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), f"{major}.{minor}", memory, partitioned)


def _nvml() -> Any:
    """NVML, begun, or None where there are no bindings or no driver."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


@contextmanager
def nvml_handle(index: int = 0) -> Iterator[tuple[Any, Any] | None]:
    """NVML and its handle of a GPU, or None where there are no bindings, no driver or no such GPU."""
    nvml = _nvml()
    if nvml is None:
        yield None
        return
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index) if index < nvml.nvmlDeviceGetCount() else None
        yield (nvml, handle) if handle is not None else None
    finally:
        nvml.nvmlShutdown()


def describe_machine(root: Path = Path("/"), *, gpu: bool = False) -> dict[str, str]:
    """What can change a latency and can be read: processor, clock, governor, quota, load, memory, system.

    With `gpu` the first GPU too: driver, clocks, power limit, ECC, MIG. What cannot be read is left out.
    """
    memory = psutil.virtual_memory().total / 1e9
    found = {
        "cpu": cpu_name(root),
        "cores": str(psutil.cpu_count(logical=False) or ""),
        "logical_cores": str(psutil.cpu_count() or ""),
        "usable_cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ""),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "max_khz": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"),
        "no_turbo": _read(root / "sys/devices/system/cpu/intel_pstate/no_turbo"),
        "quota": _read(root / "sys/fs/cgroup/cpu.max"),
        "load": f"{psutil.getloadavg()[0]:.2f}",
        "nice": str(os.nice(0)) if hasattr(os, "nice") else "",
        "memory_gb": f"{memory:.1f}",
        "machine": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    found |= _gpu_settings() if gpu else {}
    return {name: value for name, value in found.items() if value}


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's model."""
    lines = _read(root / "proc/cpuinfo").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu_settings() -> dict[str, str]:
    """Settings of the first GPU by NVML; its name alone where there are no bindings."""
    first = {"gpu": gpus()[0].name, "gpu_capability": gpus()[0].capability} if gpus() else {}
    nvml = _nvml()
    if nvml is None:
        return first
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        asked: dict[str, Callable[[], Any]] = {
            "gpu": lambda: _text(nvml.nvmlDeviceGetName(handle)),
            "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "max_sm_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "ecc": lambda: nvml.nvmlDeviceGetEccMode(handle)[0],
            "mig": lambda: nvml.nvmlDeviceGetMigMode(handle)[0],
        }
        for name, ask in asked.items():
            with suppress(nvml.NVMLError):  # a device that has no such setting says so by an error
                first[name] = str(ask())
        return first
    finally:
        nvml.nvmlShutdown()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
