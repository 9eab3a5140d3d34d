"""What a training tells while it runs: a line for each epoch, and events for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from derc.console import Console
from derc.errors import MissingDependencyError
from derc.training.outcome import Row


class Log:
    """Rows to the console, and to TensorBoard in the folder `events` where one is given."""

    def __init__(self, console: Console, events: Path | None, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.writer = None if events is None else _writer(events)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()

    def row(self, row: Row) -> None:
        """Tell one row."""
        self.console.say(line(row, self.epochs))
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in ("epoch", "step") and value is not None:
                self.writer.add_scalar(f"derc/{name}", value, row["step"])
        self.writer.flush()


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            '--tensorboard needs the package tensorboard, which is not installed: pip install "derc[train]"'
        ) from error
    return SummaryWriter(str(folder))


def line(row: Row, epochs: int) -> str:
    """A row as one line of text."""
    averaged = row["average_accuracy"]
    besides = f", average {averaged:.4f}" if averaged is not None else ""
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  validation {row['validation_accuracy']:.4f}{besides}  "
        f"lr {row['lr']:.2g}  {row['seconds']:.0f} s"
    )


def as_csv(rows: Iterable[Row]) -> str:
    """The log as CSV with a header; what is not known is empty."""
    every = list(rows)
    out = io.StringIO()
    if every:
        writer = csv.DictWriter(out, list(every[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)
    return out.getvalue()
