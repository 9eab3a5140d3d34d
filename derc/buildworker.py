"""The child process of `derc.building`: builds one engine after another, as it is told.

Started by `python -m derc.buildworker`. Each request is one line of JSON on stdin, each reply one on stdout: first
`class`, `threads`, `variant` of the engine, then `model` and `path` of each build. A reply is empty, or holds the
`error`'s class names from its own up to DercError and its `message`. Any other exception ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import threading
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, TextIO

import psutil

from derc.engine import Engine
from derc.errors import DercError


def main() -> None:
    """Serve until stdin ends."""
    requests, replies = _channels()
    engine: Engine | None = None
    for request in _read(requests):
        reply: dict[str, Any] = {}
        try:
            if engine is None:
                engine = _engine(request)
            else:
                engine.build(Path(request["model"]).read_bytes(), Path(request["path"]))
        except DercError as error:
            names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, DercError)]
            reply = {"error": names, "message": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


def _channels() -> tuple[TextIO, TextIO]:
    """Where requests come from and replies go; what the runtime itself reads is empty, and prints goes to stderr."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _read(source: TextIO) -> Iterator[dict[str, Any]]:
    """Requests as they come; a thread listens, so that the parent's end ends this process in the midst of a build."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in source:
            lines.put(line)
        end_tree(psutil.Process())

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def _engine(request: dict[str, Any]) -> Engine:
    module, _, path = request["class"].partition(":")
    kind = reduce(getattr, path.split("."), importlib.import_module(module))
    engine: Engine = kind(threads=request["threads"], variant=request["variant"])  # type: ignore[operator]
    return engine


def end_tree(process: psutil.Process) -> None:
    """Kill `process` and all that it started, children first, as the process itself may be the caller."""
    for one in (*tree(process)[:0:-1], process):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


def tree(process: psutil.Process) -> list[psutil.Process]:
    """`process` and its descendants, itself first; empty where it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main()
