"""The doctor: what is missing gets one remedy, and nothing that is absent makes it stumble."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from derc import doctor
from derc.doctor import Finding, diagnose, healthy, render

INSTALLED = dict.fromkeys(("derc", *doctor.REQUIRED, "onnxruntime"), "1.0")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare root folder, a store in it, and no licence."""
    monkeypatch.setenv("DERC_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GRB_LICENSE_FILE", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


def install(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    """Let exactly `packages` be installed, with their files."""

    def version(name: str) -> str:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_a_bare_machine_without_anything_is_diagnosed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {})
    findings = diagnose(machine)
    assert not healthy(findings)
    faults = {finding.name for finding in findings if not finding.ok and finding.severity == "fault"}
    assert faults == {"derc", *doctor.REQUIRED, "onnxruntime"}
    assert all(finding.remedy for finding in findings if not finding.ok)


def test_optional_things_are_no_faults(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, INSTALLED)
    findings = diagnose(machine)
    assert healthy(findings)
    missing = {finding.name: finding.severity for finding in findings if not finding.ok}
    options = ("gurobipy", "transformers", "openvino", "nncf", "compiler", "tensorrt", "nvidia")
    assert missing == dict.fromkeys(options, "info") | {name: "warning" for name in missing if name == "memory"}


def test_two_onnxruntimes_at_once_are_a_fault(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, INSTALLED | {"onnxruntime-gpu": "1.0"})
    finding = named(diagnose(machine), "onnxruntime")
    assert not finding.ok and finding.severity == "fault"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu" in finding.remedy


def test_a_gpu_runtime_alone_serves_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {name: version for name, version in INSTALLED.items() if name != "onnxruntime"}
    install(monkeypatch, packages | {"onnxruntime-gpu": "1.0"})
    assert healthy(diagnose(machine))


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_a_package_whose_files_are_gone_is_a_fault(machine: Path, monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    install(monkeypatch, INSTALLED)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    finding = named(diagnose(machine), "onnxruntime")
    assert not finding.ok and "--force-reinstall onnxruntime" in finding.remedy


def test_gurobi_licence_is_found(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, INSTALLED | {"gurobipy": "13.0"})
    assert "no licence file" in named(diagnose(machine), "gurobipy").detail
    write(machine / "opt/gurobi1300/gurobi.lic", "")
    assert named(diagnose(machine), "gurobipy").ok
    write(machine / "mine.lic", "")
    monkeypatch.setenv("GRB_LICENSE_FILE", str(machine / "mine.lic"))
    assert "mine.lic" in named(diagnose(machine), "gurobipy").detail


def test_tensorrt_needs_bindings_and_libraries(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, INSTALLED | {"tensorrt": "11.4"})
    assert "no libraries" in named(diagnose(machine), "tensorrt").detail
    write(machine / "usr/lib/x86_64-linux-gnu/libnvinfer.so.11", "")
    assert named(diagnose(machine), "tensorrt").ok
    install(monkeypatch, INSTALLED | {"tensorrt": "10.13"})
    finding = named(diagnose(machine), "tensorrt")
    assert not finding.ok and "tensorrt 10.13" in finding.detail and "needs version 11" in finding.remedy


class NvmlError(Exception):
    """Stands for pynvml.NVMLError."""


def nvml(gpus: list[str | bytes], error: Exception | None = None) -> SimpleNamespace:
    def start() -> None:
        if error:
            raise error

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetName=lambda handle: gpus[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * 2**30),
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )


def test_gpus_are_listed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(["NVIDIA H100", b"NVIDIA T4"]))
    finding = named(diagnose(machine), "nvidia")
    assert finding.ok and finding.detail == "driver 580.1: NVIDIA H100 80 GiB, NVIDIA T4 80 GiB"


@pytest.mark.parametrize("library", [nvml([]), nvml([], NvmlError("Driver Not Loaded")), None])
def test_a_missing_gpu_is_information(machine: Path, monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    finding = named(diagnose(machine), "nvidia")
    assert not finding.ok and finding.severity == "info" and finding.remedy


def test_a_driver_without_bindings_is_seen(machine: Path) -> None:
    write(machine / "proc/driver/nvidia/version", "NVRM version: 580.1")
    assert "nvidia-ml-py" in named(diagnose(machine), "nvidia").remedy


def test_cpu_model_and_vector_flags_are_read(machine: Path) -> None:
    write(machine / "proc/cpuinfo", "model name\t: Xeon 8488C\nflags\t\t: fpu avx2 avx512f amx_int8 amx_bf16\n")
    findings = diagnose(machine)
    assert named(findings, "cpu").detail == "Xeon 8488C"
    assert named(findings, "vectors").detail == "avx2 avx512f amx_int8 amx_bf16"
    write(machine / "proc/cpuinfo", "flags\t: fpu sse2\n")
    assert not named(diagnose(machine), "vectors").ok


def test_what_spoils_latencies_is_a_warning(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, INSTALLED)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (64.0, 0.0, 0.0))
    write(machine / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n")
    write(machine / "sys/fs/cgroup/cpu.max", "50000 100000\n")
    findings = diagnose(machine)
    assert healthy(findings)
    for name in ("load", "governor", "quota"):
        assert not named(findings, name).ok and named(findings, name).severity == "warning"
    write(machine / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    write(machine / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert named(diagnose(machine), "governor").ok and named(diagnose(machine), "quota").ok


def test_a_store_that_cannot_be_written_is_a_warning(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(machine / "file", "")
    monkeypatch.setenv("DERC_CACHE", str(machine / "file"))
    finding = named(diagnose(machine), "store")
    assert not finding.ok and "DERC_CACHE" in finding.remedy


def test_render_gives_marks_remedies_and_the_verdict() -> None:
    findings = [
        Finding("a", True, "1.0"),
        Finding("long", False, "gone", "fetch it"),
        Finding("b", False, "-", "x", "info"),
    ]
    lines = render(findings).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["ok", "fault", "→", "info", "→"]
    assert lines[2].endswith("→ fetch it") and lines[-1] == "not ready for derc compile --target cpu"
    assert render(findings[:1]).endswith("\nready for derc compile --target cpu")


def test_it_is_quick_and_loads_no_runtime(tmp_path: Path) -> None:
    code = (
        "import sys; from derc import doctor; doctor.render(doctor.diagnose()); "
        "sys.exit(bool({'torch', 'onnxruntime', 'gurobipy', 'openvino', 'tensorrt', 'highspy'} & set(sys.modules)))"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], check=False, env={"DERC_CACHE": str(tmp_path)})
    assert result.returncode == 0
    assert time.perf_counter() - started < 10
