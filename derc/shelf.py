"""Imported latency tables, kept in the store's folder by their content."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from derc.errors import UsageError, suggest
from derc.tables import TableFile, read, replace_file, samples_path

FOLDER = "tables"
LETTERS = 12
"""Digits of a table's seal that are its name."""


@dataclass(frozen=True)
class Shelf:
    """Tables under `root`/tables, which the store's own clearing leaves alone."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    def names(self) -> list[str]:
        """Names of all tables."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def tables(self) -> dict[str, TableFile]:
        """All tables by name; raises IntegrityError, naming the file, where one was changed."""
        return {name: read(self.path(name)) for name in self.names()}

    def path(self, name: str) -> Path:
        """Where the table called `name` is."""
        return self.folder / f"{name}.json"

    def add(self, path: Path) -> tuple[str, TableFile]:
        """Keep the table in the file `path`, and the samples beside it; returns its name and itself.

        Raises as `derc.tables.read` does, and UsageError where the folder cannot be written.
        """
        table = read(path)
        name = table.seal[:LETTERS]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path(name), path.read_text(encoding="utf-8"))
            if samples_path(path).is_file():
                shutil.copyfile(samples_path(path), samples_path(self.path(name)))
        except OSError as error:
            raise UsageError(f"the table cannot be kept in {self.folder}: {error.strerror}") from error
        return name, table

    def find(self, name: str) -> tuple[str, TableFile]:
        """The table called `name` or by its first digits, or the only one of the target `name`.

        Raises UsageError where there is none, or more than one.
        """
        tables = self.tables()
        close = [key for key, table in tables.items() if table.target == name] or [
            key for key in tables if len(name) >= 4 and key.startswith(name)
        ]
        if len(close) > 1:
            raise UsageError(f"{name!r} may be any of the tables {', '.join(close)}: name one of them")
        if not close:
            known = [*tables, *dict.fromkeys(table.target for table in tables.values())]
            listed = f"imported are {', '.join(known)}{suggest(name, known)}" if known else "none was imported"
            raise UsageError(f"there is no latency table {name!r}: {listed}")
        return close[0], tables[close[0]]

    def remove(self, name: str) -> str:
        """Forget the table that `find` finds; returns its name."""
        found, _ = self.find(name)
        self.path(found).unlink()
        samples_path(self.path(found)).unlink(missing_ok=True)
        return found

    def export(self, name: str, path: Path) -> str:
        """Write the table that `find` finds, and its samples, to `path`; returns its name."""
        found, _ = self.find(name)
        try:
            replace_file(path, self.path(found).read_text(encoding="utf-8"))
            if samples_path(self.path(found)).is_file():
                shutil.copyfile(samples_path(self.path(found)), samples_path(path))
        except OSError as error:
            raise UsageError(f"the table cannot be written to {path}: {error.strerror}") from error
        return found
