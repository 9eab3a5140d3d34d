"""The wheel and the sdist build, install and work outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import pathlib, sys
import derc, derc.passes.select, derc.backends.highs, derc.report
assert pathlib.Path(derc.__file__).is_relative_to(sys.argv[1]), derc.__file__
assert '<html' in derc.report.render({})
from derc.zoo import Zoo
assert len(Zoo.load('digits').donors) >= 6
for name in ('passes', 'backends'):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + ' can be imported at top level')
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_installed_package_works(dist, tmp_path, pattern):
    (built,) = dist.glob(pattern)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*command, str(built)], check=True)
    run = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(site)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_wheel_holds_each_file_once_and_the_weights(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert not [name for name in names if name.split("/")[0] in ("passes", "backends", "tests")]
    assert sum(name.endswith(".safetensors") for name in names) >= 6
    assert "derc/py.typed" in names and "derc/targets/a100.toml" in names
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("derc/passes/select.py") for name in archive.getnames())


def test_no_extra_pulls_both_onnxruntimes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {"cpu", "gpu", "gurobi", "hf", "openvino", "train", "dev"}

    def packages(requirements):
        return {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}

    base = packages(project["dependencies"])
    assert not base & {"onnxruntime", "onnxruntime-gpu"}
    for requirements in project["optional-dependencies"].values():
        assert not {"onnxruntime", "onnxruntime-gpu"} <= packages(requirements)
    assert {"onnxruntime-gpu", "tensorrt", "nvidia-ml-py"} <= packages(project["optional-dependencies"]["gpu"])
