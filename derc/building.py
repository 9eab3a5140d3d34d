"""Building engines in a child process: a runtime that crashes, hangs or eats all memory ends one build, not derc."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from derc import enginelock, errors
from derc.buildworker import end_tree, tree
from derc.engine import Engine, Session
from derc.errors import BuildError, DercError

START_S = 120.0
"""How long a child may take to import a runtime."""
POLL_S = 0.05
"""How often the memory of a build is looked at."""
FULL = 0.5
"""A child that still holds this share of its memory limit after a build is replaced: the next build starts fresh."""


class Builder:
    """Builds in up to `workers` children with engines like `engine`, which is not used itself but to load.

    A build may take `limit_s` seconds and `memory_gb` (10⁹ bytes; None: any amount). The children live until `close`,
    or as long as the builder; one that a build has ended is replaced. A DercError that is raised in a child arrives
    here as it is.
    """

    def __init__(self, engine: Engine, limit_s: float = 120, memory_gb: float | None = None, workers: int = 1) -> None:
        self.engine = engine
        self.workers = workers
        self._folder = tempfile.TemporaryDirectory(prefix="derc-build-", ignore_cleanup_errors=True)
        self._numbers = count()
        folder = Path(self._folder.name)
        self._all = [Worker(engine, limit_s, memory_gb, folder / f"{n}.log") for n in range(workers)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._end = weakref.finalize(self, _close, self._all)

    def build(self, model: bytes, path: Path, name: str = "") -> None:
        """Write the engine of ONNX `model` to `path` in one step, its lock before it; `name` is what errors call it.

        Raises BuildError where the build crashes or takes too much time or memory, else what the engine raises.
        """
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            built = Path(folder, path.name)
            self._build(model, built, name or path.name)
            lock = enginelock.place(built)
            if lock.exists():
                lock.replace(enginelock.place(path))
            built.replace(path)

    def session(self, model: bytes, name: str = "a model") -> Session:
        """A session of ONNX `model`, built in a child and loaded here; raises what `build` and `load` raise."""
        return self.engine.load(self._built(model, name))

    def sessions(
        self, models: Iterable[tuple[str, bytes]], ahead: int = 8
    ) -> Iterator[tuple[str, Session | DercError]]:
        """A session, or why there is none, for each named model, in order.

        Builds run side by side in all workers while `models` makes the next ones; at most `ahead` are held in memory.
        """
        pool, waiting = ThreadPoolExecutor(self.workers), deque[tuple[str, Future[Path]]]()
        try:
            for name, model in models:
                waiting.append((name, pool.submit(self._built, model, name)))
                while waiting and (len(waiting) >= ahead or waiting[0][1].done()):
                    yield self._loaded(*waiting.popleft())
            while waiting:
                yield self._loaded(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _loaded(self, name: str, built: Future[Path]) -> tuple[str, Session | DercError]:
        try:
            return name, self.engine.load(built.result())
        except DercError as error:
            return name, error

    def _built(self, model: bytes, name: str) -> Path:
        path = Path(self._folder.name, f"{next(self._numbers)}{self.engine.suffix}")
        self._build(model, path, name)
        return path

    def _build(self, model: bytes, path: Path, name: str) -> None:
        source = Path(self._folder.name, f"{next(self._numbers)}.model")
        with self._worker() as worker:
            source.write_bytes(model)
            worker.build(source, path, name)
            source.unlink()

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        worker = self._idle.get()
        try:
            worker.check_open()
            yield worker
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the children and remove all temporary files; sessions stay as they are."""
        self._end()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()


@dataclass
class Child:
    """A running child; `lines` holds its replies, and None once it has closed its end."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request; to a child that has ended too, for then its reply is None."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                print(json.dumps(request), file=self.process.stdin, flush=True)

    @property
    def memory(self) -> float:
        """Resident memory of the child and all that it started, in 10⁹ bytes; pages that they share count each time."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            for process in tree(psutil.Process(self.process.pid)):
                total += process.memory_info().rss
        return total / 1e9

    def end(self) -> None:
        """Kill it and all that it started, what has lost its parent included."""
        with suppress(psutil.NoSuchProcess):
            end_tree(psutil.Process(self.process.pid))
        self.process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


class Worker:
    """One child at a time, started when there is something to build and no child."""

    def __init__(self, engine: Engine, limit_s: float, memory_gb: float | None, log: Path) -> None:
        kind = type(engine)
        self._hello = {
            "class": f"{kind.__module__}:{kind.__qualname__}",
            "threads": engine.threads,
            "variant": engine.variant,
        }
        self._name = engine.name
        self._limit_s = limit_s
        self._memory_gb = memory_gb
        self._log = log
        self._child: Child | None = None
        self._closed = False

    def build(self, model: Path, path: Path, name: str) -> None:
        """Let the child build; see `Builder.build`."""
        child = self._child or self._start(name)
        os.truncate(self._log, 0)
        child.ask({"model": str(model), "path": str(path)})
        reply = self._reply(child, name, self._limit_s)
        if self._memory_gb is not None and child.memory > FULL * self._memory_gb:
            self._end()
        if reply:
            raise _error(reply)

    def check_open(self) -> None:
        """Raise DercError after `close`."""
        if self._closed:
            raise DercError("this builder is closed")

    def _start(self, name: str) -> Child:
        """A child whose engine is ready; raises what making the engine raises there."""
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the parent alone, which ends the child in order.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "derc.buildworker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,
            )
        self._child = child = Child(process)
        if self._closed:  # in the meantime, by another thread
            self._end()
            self.check_open()
        child.ask(self._hello)
        reply = self._reply(child, name, START_S)
        if reply:
            self._end()
            raise _error(reply)
        return child

    def _reply(self, child: Child, name: str, limit_s: float) -> dict[str, Any]:
        """The child's next reply; raises BuildError, and ends the child, where none comes within the limits."""
        deadline = time.monotonic() + limit_s
        try:
            while True:
                with suppress(queue.Empty):
                    line = child.lines.get(timeout=POLL_S)
                    break
                if time.monotonic() > deadline:
                    raise self._failure(name, f"took more than {limit_s:g} s: raise the time limit")
                if self._memory_gb is not None and child.memory > self._memory_gb:
                    raise self._failure(name, f"took more than {self._memory_gb:g} GB: raise the memory limit")
                if child.process.poll() is not None:  # what it forked may keep the pipe open
                    line = None
                    break
            if line is None:
                raise self._ended(child.process.wait(), name)
        except BaseException:
            self._end()
            raise
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self, code: int, name: str) -> BuildError:
        """Why a child with this exit code came to no reply."""
        if self._closed:
            return self._failure(name, "was cut short by the end of the compile: start it again")
        words = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
        said = f" ({words})" if words else ""
        if code >= 0:
            return self._failure(name, f"ended with exit code {code}{said}: try another version of the runtime")
        if -code == signal.SIGKILL:
            return self._failure(name, f"was killed, as the system does when memory is short{said}: free memory")
        cause = signal.Signals(-code).name
        return self._failure(name, f"crashed with {cause}{said}: try another version of the runtime")

    def _failure(self, name: str, what: str) -> BuildError:
        return BuildError(f"the build of {name} with {self._name} {what}, or use another engine or precision")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def close(self) -> None:
        """End the child for good."""
        self._closed = True
        self._end()


def _error(reply: dict[str, Any]) -> DercError:
    """The error that a reply tells of: of the first class among its own and its bases that derc itself has."""
    known = (getattr(errors, name, None) for name in reply["error"])
    kind: type[DercError] = next(kind for kind in known if kind is not None)
    return kind(reply["message"])
