"""Messages and progress on stderr; progress only where stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Console:
    """What passes talk through; `quiet` drops the messages, errors excepted."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.interactive = sys.stderr.isatty() and not quiet

    def say(self, message: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate over `items` with a progress bar."""
        if not self.interactive:
            yield from items
            return
        from tqdm import tqdm

        yield from tqdm(items, desc=label, total=total, leave=False, file=sys.stderr)

    @contextmanager
    def status(self, label: str) -> Iterator[None]:
        """Show `label` while the body runs."""
        if self.interactive:
            print(f"{label} …", end="\r", file=sys.stderr, flush=True)
        yield
        if self.interactive:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)
