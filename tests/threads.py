"""The same program on one thread and on two."""

from __future__ import annotations

import os
import subprocess
import sys


def on_one_and_two(program: str) -> set[str]:
    """What a Python program prints when numerical libraries take one thread, and when they take two."""
    return {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
        ).stdout
        for threads in "12"
    }
