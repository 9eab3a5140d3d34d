"""How many threads an engine gets."""

from __future__ import annotations

import os

import psutil

from derc.errors import UsageError


def cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def resolve(threads: int) -> int:
    """`threads`, or the cores where it is 0; raises UsageError where it is negative."""
    if threads < 0:
        raise UsageError(f"the number of threads is {threads}, and must be 0 (physical cores) or more")
    return threads or cores()
