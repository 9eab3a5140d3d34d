"""Work in several processes at once, each of which ends with its parent; what they say and raise arrives here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from derc.errors import DercError

Say = Callable[[str], None]
Work = Callable[[Say], None]
"""What a process does; it must be picklable, and gets what to tell lines of text with."""
CHILDREN = multiprocessing.get_context("spawn")


def run(every: Sequence[tuple[str, Work]], jobs: int, say: Say) -> None:
    """Do all of the named works, at most `jobs` at once, the next one when one ends.

    Raises what a process raises, and DercError where one ends without a word; the others are then ended.
    """
    waiting, running = list(every), dict[Connection, tuple[str, SpawnProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, work = waiting.pop(0)
                ours, theirs = CHILDREN.Pipe()
                child = CHILDREN.Process(target=_child, args=(work, theirs), name=name)
                child.start()
                theirs.close()
                running[ours] = name, child
            for one in wait(list(running)):
                if isinstance(one, Connection) and _over(one, *running[one], say):
                    del running[one]
    finally:
        for _, child in running.values():
            child.kill()
            child.join()


def _over(pipe: Connection, name: str, child: SpawnProcess, say: Say) -> bool:
    """Take one message; whether it was the child's last."""
    try:
        message: Any = pipe.recv()
    except EOFError:
        child.join()
        raise DercError(_ended(name, child.exitcode or 0)) from None
    if isinstance(message, str):
        say(message)
        return False
    child.join()
    if message is not None:
        raise message
    return True


def _ended(name: str, code: int) -> str:
    if code == -signal.SIGKILL:
        what = "was killed, as the system does when memory is short: lower --blockwise-jobs"
    else:
        what = f"ended with exit code {code}: its last words are above"
    return f"the process that trains {name} {what}"


def _child(work: Work, pipe: Connection) -> None:
    """Ctrl-C reaches the parent alone, which ends the child; the parent's end ends it, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, daemon=True).start()
    try:
        work(pipe.send)
    except DercError as error:
        pipe.send(error)
        return
    pipe.send(None)


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            wait([parent.sentinel])
        os._exit(1)
