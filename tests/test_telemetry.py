"""Runtimes that derc imports leave nothing in the home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("module", ["derc.backends.onnxruntime", "derc.onnxdonor.network", "derc.quantization"])
def test_importing_onnxruntime_after_derc_writes_nothing(module: str, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    script = f"import {module}, onnxruntime"
    subprocess.run([sys.executable, "-c", script], check=True, env=environ | {"HOME": str(tmp_path)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_choice_of_the_user_stands() -> None:
    script = "import derc, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environ = os.environ | {"ORT_DISABLE_TELEMETRY": "0"}
    run = subprocess.run([sys.executable, "-c", script], check=True, env=environ, capture_output=True, text=True)
    assert run.stdout.strip() == "0"
