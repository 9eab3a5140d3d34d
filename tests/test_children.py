"""Works in other processes: what they say and raise arrives, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from derc import children
from derc.errors import DercError, UsageError


def speak(text: str, say: children.Say) -> None:
    say(text)
    say(str(os.getpid()))


def refuse(say: children.Say) -> None:
    raise UsageError("these make no sense")


def vanish(code: int, say: children.Say) -> None:
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def linger(path: Path, say: children.Say) -> None:
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    time.sleep(600)


def test_every_work_is_done_in_a_process_of_its_own():
    said = []
    children.run([(name, partial(speak, name)) for name in ("one", "two", "three")], 2, said.append)
    numbers = {word for word in said if word.isdigit()}
    assert sorted(set(said) - numbers) == ["one", "three", "two"]
    assert len(numbers) == 3 and str(os.getpid()) not in numbers


def test_what_a_process_raises_arrives_and_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(UsageError, match="these make no sense"):
        children.run([("one", partial(linger, tmp_path / "pid")), ("two", refuse)], 2, print)
    assert time.monotonic() - start < 300
    if (tmp_path / "pid").exists():
        assert not alive(int((tmp_path / "pid").read_text()))


def test_a_process_that_ends_without_a_word_is_named():
    with pytest.raises(DercError, match="the process that trains two ended with exit code 3"):
        children.run([("two", partial(vanish, 3))], 1, print)
    with pytest.raises(DercError, match=r"the process that trains two was killed, .*: lower --blockwise-jobs"):
        children.run([("two", partial(vanish, -signal.SIGKILL))], 1, print)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


ORPHAN = """
import sys
from functools import partial
from pathlib import Path
from derc import children
from tests.test_children import linger
if __name__ == "__main__":
    children.run([("one", partial(linger, Path(sys.argv[1])))], 1, print)
"""


def test_a_process_ends_with_its_parent(tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "main.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(tmp_path / "pid")], env=environment)
    while parent.poll() is None and not (tmp_path / "pid").exists():
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 120
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
