"""Builds in a child: what they give is what a direct build gives, and whatever happens there ends one build alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from derc.backends.onnxruntime import OnnxRuntime
from derc.building import Builder
from derc.errors import BuildError, DercError, PrecisionError
from derc.exporting import export
from tests.engines import Absent, Faulty, asking

X = np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def model() -> bytes:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return export(network.eval(), torch.from_numpy(X), ["y"])


@pytest.fixture(scope="module")
def builder():
    with Builder(Faulty(threads=1), limit_s=20) as made:
        yield made


def gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_build_in_the_child_is_the_direct_build(builder, model, tmp_path):
    builder.build(model, tmp_path / "child.onnx")
    Faulty(threads=1).build(model, tmp_path / "direct.onnx")
    assert (tmp_path / "child.onnx").read_bytes() == (tmp_path / "direct.onnx").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_lock_of_an_engine_comes_with_it(builder, model, tmp_path):
    builder.build(asking(model, "locked"), tmp_path / "engine.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["engine.lock.json", "engine.onnx"]
    assert (tmp_path / "engine.lock.json").read_text() == "a lock"


def test_a_session_runs_as_a_direct_one(builder, model):
    session, direct = builder.session(model), Faulty(threads=1).open(model)
    np.testing.assert_array_equal(session.run(X), direct.run(X))
    session.close()


def test_the_child_has_the_engines_threads_and_lives_long(builder, model, tmp_path):
    pids = set()
    for _ in range(2):
        builder.session(asking(model, "tell", tmp_path / "pid")).close()
        pids.add((tmp_path / "pid").read_text())
    assert len(pids) == 1 and pids != {str(os.getpid())}


def test_a_child_is_a_new_process_and_no_fork(builder, model, tmp_path):
    """OpenMP's and torch's threads do not survive a fork: a forked build could hang."""
    torch.ones(500, 500) @ torch.ones(500, 500)
    builder.session(asking(model, "tell", tmp_path / "pid")).close()
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    assert child.cmdline()[-2:] == ["-m", "derc.buildworker"]


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("crash", "crashed with SIGSEGV"),
        ("killed", "was killed, as the system does when memory is short"),
        ("bug", r"ended with exit code 1 \(ZeroDivisionError: a bug of the runtime's\)"),
    ],
)
def test_a_crash_is_one_sentence_and_ends_one_build(builder, model, tmp_path, fault, what):
    with pytest.raises(BuildError, match=f"^the build of net\\[0:3\\] with onnxruntime {what}.*: ") as caught:
        builder.build(asking(model, fault), tmp_path / "engine.onnx", name="net[0:3]")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    builder.session(model).close()


def test_a_hang_is_ended_with_all_that_it_started(model, tmp_path):
    with Builder(Faulty(threads=1), limit_s=2) as builder:
        builder.session(model).close()
        start = time.monotonic()
        with pytest.raises(
            BuildError, match=r"the build of net with onnxruntime took more than 2 s: raise the time limit"
        ):
            builder.session(asking(model, "hang", tmp_path / "pids"), "net")
        assert time.monotonic() - start < 4
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 2 and all(map(gone, pids))
        builder.session(model).close()


def test_a_crash_that_leaves_a_fork_behind_is_seen_at_once(builder, model, tmp_path):
    start = time.monotonic()
    with pytest.raises(BuildError, match="SIGABRT"):
        builder.session(asking(model, "forked_crash", tmp_path / "pids"))
    assert time.monotonic() - start < 10
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_memory_over_the_limit_ends_the_build(model):
    with Builder(Faulty(threads=1), memory_gb=0.6) as builder:
        with pytest.raises(BuildError, match=r"took more than 0\.6 GB: raise the memory limit"):
            builder.session(asking(model, "grow"))
        builder.session(model).close()


def test_a_child_that_keeps_much_memory_is_replaced(model, tmp_path):
    pids = set()
    with Builder(Faulty(threads=1), memory_gb=1.2) as builder:
        for fault in ("tell", "bulge", "tell"):
            builder.session(asking(model, fault, tmp_path / "pid")).close()
            pids.add((tmp_path / "pid").read_text())
    assert len(pids) == 2


def test_errors_arrive_as_they_are(builder, model):
    with pytest.raises(PrecisionError, match=r"^block r\[0:1\] overflows in fp16: use bf16$"):
        builder.session(asking(model, "raises"))
    with pytest.raises(DercError, match="onnxruntime failed in loading the model"):
        builder.session(asking(model, "invalid"))


def test_an_engine_that_cannot_be_made_there_says_so(model):
    with Builder(Absent(threads=1)) as builder, pytest.raises(PrecisionError, match="no such device: plug one in"):
        builder.session(model)


@pytest.mark.parametrize("fault", ["chatter", "ask"])
def test_what_the_runtime_prints_and_reads_does_not_matter(builder, model, fault):
    builder.session(asking(model, fault)).close()


def test_many_workers_keep_the_order_and_the_failures(model):
    faults = {"a": "", "b": "crash", "c": "", "d": "raises", "e": ""}
    with Builder(Faulty(threads=1), workers=2) as builder:
        found = dict(builder.sessions({name: asking(model, fault) for name, fault in faults.items()}.items()))
    assert list(found) == list(faults)
    assert isinstance(found["b"], BuildError) and "build of b" in str(found["b"])
    assert isinstance(found["d"], PrecisionError)
    want = OnnxRuntime(threads=1).open(model).run(X)
    for name in "ace":
        np.testing.assert_array_equal(found[name].run(X), want)


def test_closing_ends_the_children_and_removes_the_files(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Builder(Faulty(threads=1)) as builder:
        builder.session(asking(model, "tell", tmp_path / "pid")).close()
    assert gone(int((tmp_path / "pid").read_text()))
    assert [file.name for file in tmp_path.iterdir()] == ["pid"]
    with pytest.raises(DercError, match="closed"):
        builder.session(model)


SCRIPT = """
import sys
from pathlib import Path
from derc.building import Builder
from tests.engines import Faulty
with Builder(Faulty(threads=1), workers=2) as builder:
    list(builder.sessions({"a": Path(sys.argv[1]).read_bytes()}.items()))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_end_of_the_parent_leaves_no_orphan(model, tmp_path, number, code):
    (tmp_path / "m").write_bytes(asking(model, "hang", tmp_path / "pids"))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m")]
    parent = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(timeout=20) == code
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
