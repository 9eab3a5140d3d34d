"""What else a device does while it is measured, or what holds it back: a latency measured so would not hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from derc.devices import nvml_handle
from derc.errors import UnstableError
from derc.target import Target
from derc.threads import cores

BUSY_GPU = 10
"""Utilisation of a GPU in per cent, before derc runs on it, from which on others use it."""
BUSY_CPU = 0.25
"""Share of the cores that other work may take before it is said."""
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


def of_processor(busy: float | None = None) -> tuple[str, ...]:
    """Sentences on other work on this machine; `busy` is the number of cores that it takes, looked at if not given."""
    busy = others_cores() if busy is None else busy
    if busy <= BUSY_CPU * cores():
        return ()
    return (f"other work takes {busy:.1f} of {cores()} cores: latencies will scatter",)


def others_cores(seconds: float = 0.5) -> float:
    """How many cores other processes take, over `seconds`."""

    def now() -> tuple[float, float]:
        times = psutil.cpu_times()
        return times.user + times.system + getattr(times, "nice", 0.0), sum(os.times()[:4])

    every, own = now()
    time.sleep(seconds)
    every_later, own_later = now()
    return max(every_later - every - (own_later - own), 0.0) / seconds


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
