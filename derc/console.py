"""Messages and progress on stderr; progress only where stderr is a terminal."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 2.0
CLEAR = "\r\x1b[2K"


class Console:
    """What passes talk through; `quiet` drops the messages, errors excepted."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.interactive = sys.stderr.isatty() and not quiet
        self._bars = 0
        self._stopped = False

    def listen(self) -> None:
        """Remember Ctrl-C, because a library that is interrupted may swallow it; `check` then raises it again."""
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopped = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt where Ctrl-C was pressed."""
        if self._stopped:
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate over `items` with a progress bar."""
        if not self.interactive:
            for item in items:
                self.check()
                yield item
            return
        from tqdm import tqdm

        self._bars += 1
        try:
            for item in tqdm(items, desc=label, total=total, leave=False, file=sys.stderr):
                self.check()
                yield item
        finally:
            self._bars -= 1

    @contextmanager
    def status(self, label: str) -> Iterator[None]:
        """Show `label` and the seconds passed while the body runs longer than two seconds without a bar of its own."""
        if not self.interactive:
            yield
            self.check()
            return
        done = threading.Event()
        clock = threading.Thread(target=self._tick, args=(label, done), daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()
        self.check()

    def _tick(self, label: str, done: threading.Event) -> None:
        start, shown = time.monotonic(), False
        while not done.wait(0.5):
            seconds = time.monotonic() - start
            if seconds >= PATIENCE_S and not self._bars:
                print(f"{CLEAR}{label} … {seconds:.0f} s", end="", file=sys.stderr, flush=True)
                shown = True
        if shown:
            print(CLEAR, end="", file=sys.stderr, flush=True)
