"""A busy or throttled device is named: NVML is handed in, its answers are set."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from derc.disturbances import check_quiet, of_gpu, of_processor, others_cores
from derc.target import Target
from derc.threads import cores


class NoCounterError(Exception):
    """What NVML raises for a counter that a device does not have."""


def nvml(pids: tuple[int, ...] = (), used: int = 0, active: int = 0, missing: bool = False) -> SimpleNamespace:
    """NVML of one GPU with these processes, this utilisation and these reasons for lowered clocks."""

    def answer(value):
        def ask(_handle):
            if missing:
                raise NoCounterError
            return value

        return ask

    return SimpleNamespace(
        NVMLError=NoCounterError,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksEventReasonSwThermalSlowdown=32,
        nvmlClocksThrottleReasonHwThermalSlowdown=64,
        nvmlDeviceGetComputeRunningProcesses=answer([SimpleNamespace(pid=pid) for pid in pids]),
        nvmlDeviceGetUtilizationRates=answer(SimpleNamespace(gpu=used)),
        nvmlDeviceGetCurrentClocksEventReasons=answer(active),
    )


def test_an_idle_gpu_is_quiet():
    assert of_gpu(nvml(pids=(os.getpid(),), used=3, active=1), None) == ()
    assert of_gpu(nvml(pids=(7,), used=99, active=127, missing=True), None) == ()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"pids": (7, 8)}, ["2 other processes use it (7, 8)"]),
        ({"used": 80}, ["it is 80% busy"]),
        ({"active": 4}, ["its clocks are lowered by its power limit"]),
        ({"active": 32 | 64}, ["its clocks are lowered by its temperature"]),
        ({"pids": (7,), "active": 8}, ["1 other process use", "its clocks are lowered by a hardware slow-down"]),
    ],
)
def test_what_disturbs_is_named(state, says):
    found = of_gpu(nvml(**state), None)
    assert len(found) == len(says)
    assert all(text.startswith(start) for text, start in zip(found, says, strict=True))


def test_other_work_is_said_and_no_error():
    assert of_processor(0.0) == ()
    assert "other work takes 900.0 of" in of_processor(900.0)[0]
    said: list[str] = []
    check_quiet(Target.load("cpu"), said.append)
    assert all("other work takes" in sentence for sentence in said)


def test_other_processes_are_seen_and_derc_s_own_work_is_not():
    for _ in range(10):
        before = others_cores()
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            during = others_cores()
            other.kill()
        if during > before + 0.3:
            return
    if before > cores() - 0.5:
        pytest.skip("other work takes all cores as it is")
    pytest.fail(f"a busy process is not seen: {before} cores before, {during} with it")
