"""What else a device does while it is measured, or what holds it back: a latency measured so would not hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil

from derc.devices import nvml_handle
from derc.errors import UnstableError
from derc.target import Target

BUSY_GPU = 10
"""Utilisation of a GPU in per cent, before derc runs on it, from which on others use it."""
BUSY_CPU = 0.5
"""Load of the last minute, as a share of the cores, from which on other work disturbs."""
THROTTLED = {
    "nvmlClocksEventReasonSwPowerCap": "its power limit",
    "nvmlClocksThrottleReasonHwSlowdown": "a hardware slow-down",
    "nvmlClocksEventReasonSwThermalSlowdown": "its temperature",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "its temperature",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "the power brake",
}
"""Constants of NVML for what lowers a GPU's clocks, in words; idle and what its user has set are none of them."""


def check_quiet(target: Target, say: Callable[[str], None]) -> None:
    """Say what disturbs the processor; raise UnstableError where the target's GPU is used by others or throttled."""
    for sentence in of_processor():
        say(sentence)
    if target.device is None or target.device.kind != "gpu":
        return
    with nvml_handle() as found:
        reasons = of_gpu(*found) if found else ()
    if reasons:
        raise UnstableError(
            f"the GPU cannot be measured now: {'; '.join(reasons)}; stop other work on it and let it cool down"
        )


def of_processor(load: float | None = None) -> tuple[str, ...]:
    """Sentences on other work on this machine; `load` is that of the last minute, read where it is not given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = psutil.getloadavg()[0] if load is None else load
    if load <= BUSY_CPU * cores:
        return ()
    return (
        f"other work loads this machine ({load:.1f} on {cores} cores over the last minute): latencies will scatter",
    )


def of_gpu(nvml: Any, handle: Any) -> tuple[str, ...]:
    """Why the GPU of an NVML `handle` cannot be measured now: other processes, utilisation, lowered clocks."""
    found = []
    others = _asked(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle), [])
    pids = [str(process.pid) for process in others if process.pid != os.getpid()]
    if pids:
        found.append(f"{len(pids)} other process{'es' if len(pids) > 1 else ''} use it ({', '.join(pids[:4])})")
    used = _asked(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, 0)
    if used > BUSY_GPU:
        found.append(f"it is {used}% busy")
    active = _asked(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle), 0)
    words = dict.fromkeys(word for name, word in THROTTLED.items() if active & getattr(nvml, name, 0))
    return (*found, *(f"its clocks are lowered by {word}" for word in words))


def _asked(nvml: Any, ask: Callable[[], Any], otherwise: Any) -> Any:
    """What the device answers, or `otherwise` where it has no such counter."""
    try:
        return ask()
    except nvml.NVMLError:
        return otherwise
