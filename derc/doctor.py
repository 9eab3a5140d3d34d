"""What this machine has for derc, and one remedy for each thing that is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from derc import wheels
from derc.store import Store

Severity = Literal["fault", "warning", "info"]
REQUIRED = ("numpy", "networkx", "torch", "torchvision", "timm", "onnx", "onnxscript", "highspy", "safetensors")
TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
TENSORRT_MAJOR = 11
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve", "bf16")
COMPILERS = ("g++", "clang++")
GUROBI_FOLDERS = ("opt", "Library")
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/local/lib", "usr/local/tensorrt/lib")
NO_GPU = "nothing to do for --target cpu; a GPU target needs an NVIDIA GPU with its driver"
MIN_MEMORY_GB = 2.0
BUSY = 0.25


@dataclass(frozen=True)
class Finding:
    """One thing looked at; where it is not `ok`, `severity` says what that means and `remedy` what to do.

    A fault keeps `derc compile --target cpu` from working, a warning spoils latencies, info is an option not there.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    severity: Severity = "fault"


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether `derc compile --target cpu` has all it needs."""
    return all(finding.ok or finding.severity != "fault" for finding in findings)


def diagnose(root: Path = Path("/")) -> list[Finding]:
    """Look at Python, packages, devices and the state of the machine; `root` is where /proc and /sys are found."""
    return [
        _python(),
        _derc(),
        *(_package(name) for name in REQUIRED),
        _onnxruntime(),
        _gurobi(root),
        _package("transformers", 'pip install "derc[hf]" for donors of transformers', "info"),
        _package("openvino", 'pip install "derc[openvino]" for the OpenVINO engine', "info"),
        _package("nncf", 'pip install "derc[openvino]" for int8 on the OpenVINO engine', "info"),
        _compiler(),
        _tensorrt(root),
        _nvidia(root),
        *_cpu(root),
        _memory(),
        _store(),
        _governor(root),
        _quota(root),
        _load(),
    ]


def render(findings: Iterable[Finding]) -> str:
    """One line a finding, a second one with the remedy where something is to be done, and the verdict."""
    findings = list(findings)
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        mark = "ok" if finding.ok else finding.severity
        lines.append(f"{mark:<8} {finding.name:<{width}}  {finding.detail}")
        if not finding.ok:
            lines.append(f"{'':<8} {'':<{width}}  → {finding.remedy}")
    verdict = "ready for" if healthy(findings) else "not ready for"
    return "\n".join([*lines, "", f"{verdict} derc compile --target cpu"])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name) or "of unknown version"
    except metadata.PackageNotFoundError:
        return None


def _intact(module: str) -> bool:
    """Whether the module's own files are there; a folder left behind by an uninstall has no origin."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _package(name: str, remedy: str = "", severity: Severity = "fault") -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, False, "not installed", remedy or f"pip install {name}", severity)
    if not _intact(name):
        repair = f"pip install --force-reinstall {name}"
        return Finding(name, False, f"{version}, but its files are missing", repair, severity)
    return Finding(name, True, version)


def _python() -> Finding:
    version = platform.python_version()
    detail = f"{version}, {sys.executable}"
    return Finding("python", sys.version_info >= (3, 11), detail, "use Python 3.11 or later")


def _derc() -> Finding:
    version = _version("derc")
    return Finding("derc", version is not None, version or "not installed", "pip install derc")


def _onnxruntime() -> Finding:
    found = wheels.installed()
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Finding(
            "onnxruntime", False, "not installed", 'pip install "derc[cpu]", or "derc[gpu]" with an NVIDIA GPU'
        )
    if len(found) > 1:
        return Finding("onnxruntime", False, f"{detail} at once", f"they overwrite each other: {wheels.remedy(found)}")
    if not _intact("onnxruntime"):
        repair = f"pip install --force-reinstall {next(iter(found))}"
        return Finding("onnxruntime", False, f"{detail}, but its files are missing", repair)
    return Finding("onnxruntime", True, detail)


def _compiler() -> Finding:
    name = os.environ.get("CXX") or next((one for one in COMPILERS if shutil.which(one)), COMPILERS[0])
    found = shutil.which(name)
    remedy = "install g++, or name a C++ compiler in the variable CXX, for the inductor engine"
    return Finding("compiler", found is not None, found or f"no {name}", remedy, "info")


def _gurobi(root: Path) -> Finding:
    remedy = 'pip install "derc[gurobi]" and a licence, if HiGHS is too slow'
    package = _package("gurobipy", remedy, "info")
    if not package.ok:
        return package
    named = [Path(part) for part in os.environ.get("GRB_LICENSE_FILE", "").split(os.pathsep) if part]
    usual = [path for folder in GUROBI_FOLDERS for path in sorted((root / folder).glob("gurobi*/gurobi.lic"))]
    licence = next((path for path in [*named, Path.home() / "gurobi.lic", *usual] if path.is_file()), None)
    if licence is None:
        detail = f"{package.detail}, no licence file: only the package's own, limited to small programs"
        return Finding(
            "gurobipy", False, detail, "put gurobi.lic in your home folder or name it in GRB_LICENSE_FILE", "info"
        )
    return Finding("gurobipy", True, f"{package.detail}, licence {licence}")


def _tensorrt(root: Path) -> Finding:
    bindings = next((f"{name} {version}" for name in TENSORRT if (version := _version(name)) is not None), "")
    packaged = any(_version(f"{name}-libs") for name in TENSORRT)
    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    folders += [root / folder for folder in LIBRARY_FOLDERS]
    library = packaged or any(True for folder in folders for _ in folder.glob("libnvinfer.so*"))
    detail = f"{bindings or 'no bindings'}, {'libraries found' if library else 'no libraries'}"
    right = bindings.rpartition(" ")[2].startswith(f"{TENSORRT_MAJOR}.")
    remedy = f'pip install "derc[gpu]" for the TensorRT engine, which needs version {TENSORRT_MAJOR}'
    return Finding("tensorrt", right and library, detail, remedy, "info")


def _nvidia(root: Path) -> Finding:
    """GPUs as NVML sees them; without its bindings, whether a driver is loaded."""
    driver = _read(root / "proc/driver/nvidia/version")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        if not driver:
            return Finding("nvidia", False, "no driver", NO_GPU, "info")
        return Finding(
            "nvidia", False, "driver, but no NVML bindings", "pip install nvidia-ml-py to see the GPUs", "info"
        )
    try:
        driver, gpus = _gpus(nvml)
    except nvml.NVMLError as error:
        return Finding("nvidia", False, f"NVML says: {error}", NO_GPU, "info")
    return Finding("nvidia", bool(gpus), f"driver {driver}: {', '.join(gpus) or 'no GPU'}", NO_GPU, "info")


def _gpus(nvml: Any) -> tuple[str, list[str]]:
    nvml.nvmlInit()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        sizes = [nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30 for handle in handles]
        names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in handles]
        described = [f"{name} {size:.0f} GiB" for name, size in zip(names, sizes, strict=True)]
        return _text(nvml.nvmlSystemGetDriverVersion()), described
    finally:
        nvml.nvmlShutdown()


def _cpu(root: Path) -> list[Finding]:
    info = _read(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(listed[1].split()) if listed else set()
    flags = [flag for flag in FLAGS if flag in present]
    name = model[1] if model else platform.processor() or platform.machine() or "of unknown model"
    physical, usable = psutil.cpu_count(logical=False), _usable()
    cores = (
        f"{physical or 'unknown'} physical, {psutil.cpu_count() or 'unknown'} logical, {usable} usable by this process"
    )
    vector = Finding(
        "vectors",
        not listed or bool(flags),
        " ".join(flags) or ("no vector extensions" if listed else "not listed by this system"),
        "expect slow engines: ONNX Runtime is tuned for AVX2 or later",
        "warning",
    )
    return [Finding("cpu", True, name), Finding("cores", True, cores), vector]


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    enough = memory.available / 1e9 >= MIN_MEMORY_GB
    return Finding("memory", enough, detail, f"free memory: a compile wants {MIN_MEMORY_GB:g} GB or more", "warning")


def _store() -> Finding:
    told: list[str] = []
    root = Store.default(say=told.append).root
    detail = f"{root} is writable" if not told else f"{root} cannot be written"
    remedy = "set DERC_CACHE to a folder that you may write; until then nothing is remembered"
    return Finding("store", not told, detail, remedy, "warning")


def _governor(root: Path) -> Finding:
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    governors = sorted({text for file in files if (text := _read(file).strip())})
    steady = not governors or governors == ["performance"]
    remedy = "sudo cpupower frequency-set -g performance, or latencies drift with the clock"
    return Finding("governor", steady, ", ".join(governors) or "not exposed", remedy, "warning")


def _quota(root: Path) -> Finding:
    parts = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        return Finding("quota", True, "none")
    cores = int(parts[0]) / int(parts[1])
    remedy = "pin the container to whole cores (cpuset) instead, for a quota pauses the process amid a measurement"
    return Finding("quota", cores >= _usable(), f"{cores:g} cores of CPU time", remedy, "warning")


def _load() -> Finding:
    load, cores = psutil.getloadavg()[0], _usable()
    detail = f"{load:.1f} on {cores} cores over the last minute"
    remedy = "stop other work before measuring, or latencies will be wide or unstable"
    return Finding("load", load <= max(0.5, BUSY * cores), detail, remedy, "warning")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
