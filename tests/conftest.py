"""One real compile that the tests of bundle, bench and command line share."""

from __future__ import annotations

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread each: torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import derc
from derc.digits import FOLDER

KEPT = ("resnet-slim", "convnext", "vit-patch8")


def small_zoo(folder: Path, *names: str) -> Path:
    """A zoo file with some of the embedded donors, their weights given by absolute paths."""
    tables = (FOLDER / "zoo.toml").read_text().split("[[donor]]")[1:]
    chosen = [table for table in tables if any(f'name = "{name}"' in table for name in names)]
    text = "".join("[[donor]]" + table for table in chosen)
    for name in names:
        text = text.replace(f'"{name}.safetensors"', f'"{FOLDER / name}.safetensors"')
    path = folder / "zoo.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def one_thread():
    """Small networks on a busy machine wait for threads more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session", autouse=True)
def _own_store(shared):
    """Tests never touch the user's store."""
    before = os.environ.get("DERC_CACHE")
    os.environ["DERC_CACHE"] = str(shared / "store")
    yield
    if before is None:
        del os.environ["DERC_CACHE"]
    else:
        os.environ["DERC_CACHE"] = before


@pytest.fixture(scope="session")
def compiled(shared):
    """(bundle, result, zoo file) of a compile of three donors under a generous latency budget; one for all workers."""
    folder = shared / "compiled"
    with FileLock(f"{folder}.lock"):
        if not (folder / "result.json").exists():
            folder.mkdir(exist_ok=True)
            options = {"evaluations": 6, "probe": 128, "profile_s": 4, "threads": 1}  # as settled as two workers allow
            zoo = small_zoo(folder, *KEPT)
            result = derc.compile(str(zoo), "digits", latency_ms=50.0, out=folder / "out", **options)
            (folder / "result.json").write_text(json.dumps(result))
    return folder / "out", json.loads((folder / "result.json").read_text()), folder / "zoo.toml"
