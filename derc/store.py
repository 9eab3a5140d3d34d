"""Content-addressed store of artifacts and blobs: one directory an entry, each blob held against its SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.numpy
from filelock import FileLock

from derc.artifacts import decode, encode
from derc.console import Console
from derc.errors import DercError, IntegrityError

T = TypeVar("T")
Say = Callable[[str], None]

META = "meta.json"
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
KEY = re.compile(r"[0-9a-f]{16,64}")
STALE_S = 3600.0


@dataclass(frozen=True)
class Entry:
    """One entry: `size` in bytes, `created` in seconds since the epoch, `blobs` file name → SHA-256."""

    key: str
    kind: str
    note: str
    size: int
    created: float
    blobs: dict[str, str]

    def sealed(self) -> bytes:
        """Text of meta.json: canonical, with its own digest, so that any flipped bit in it shows."""
        body = asdict(self)
        seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps(body | {"seal": seal}, sort_keys=True).encode()


class Store:
    """Entries under `root`, written whole or not at all, safe between processes.

    A damaged entry raises IntegrityError; with `on_damage` it is removed, reported and treated as absent instead.
    Where nothing can be written, `say` is told once and the store only reads.
    """

    def __init__(self, root: Path, *, say: Say | None = None, on_damage: Say | None = None) -> None:
        self.root = root
        self.on_damage = on_damage
        self._say = say or Console().say
        self._writable = True
        self._prepare()

    @classmethod
    def default(cls, *, say: Say | None = None, on_damage: Say | None = None) -> Store:
        """The user's store: $DERC_CACHE, or `derc` in the XDG cache folder."""
        base = os.environ.get("XDG_CACHE_HOME")
        home = (Path(base) if base else Path.home() / ".cache") / "derc"
        return cls(Path(os.environ.get("DERC_CACHE") or home), say=say, on_damage=on_damage)

    def get(self, key: str, kind: type[T]) -> T | None:
        """The artifact of type `kind` stored under `key`, or None; see the class for damage."""

        def parse(blobs: dict[str, bytes]) -> T:
            arrays = safetensors.numpy.load(blobs["arrays.safetensors"]) if "arrays.safetensors" in blobs else {}
            return decode(kind, blobs["artifact.json"].decode(), arrays)

        return self._get(key, kind.__name__, parse)

    def put(self, key: str, artifact: Any, note: str = "") -> None:
        """Keep `artifact` under `key`, in place of what was there."""
        text, arrays = encode(artifact)
        blobs = {"artifact.json": text.encode()}
        if arrays:
            blobs["arrays.safetensors"] = safetensors.numpy.save(arrays)
        self._put(key, type(artifact).__name__, note, blobs)

    def get_bytes(self, key: str) -> bytes | None:
        """The raw blob stored under `key`, or None; see the class for damage."""
        return self._get(key, "bytes", lambda blobs: blobs["data.bin"])

    def put_bytes(self, key: str, data: bytes, note: str = "") -> None:
        """Keep the raw blob `data` under `key`."""
        self._put(key, "bytes", note, {"data.bin": data})

    def entries(self) -> list[Entry]:
        """All entries, oldest first; one whose meta.json is unreadable has the kind ``damaged``."""
        found = []
        for folder in self._folders():
            try:
                found.append(self._meta(folder))
            except FileNotFoundError:
                continue
            except IntegrityError as error:
                size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
                found.append(Entry(folder.name, "damaged", str(error), size, folder.stat().st_mtime, {}))
        return sorted(found, key=lambda entry: (entry.created, entry.key))

    def verify(self) -> list[tuple[str, str]]:
        """Read every blob again; (key, what is wrong) of each damaged entry."""
        damaged = []
        for folder in self._folders():
            try:
                with self._lock():
                    self._read(folder)
            except FileNotFoundError:
                continue
            except IntegrityError as error:
                damaged.append((folder.name, str(error)))
        return damaged

    def gc(
        self, *, max_bytes: int | None = None, older_than_days: float | None = None, everything: bool = False
    ) -> tuple[int, int]:
        """Remove damaged entries, leftovers of killed processes, and, oldest first, what is over the limits.

        Returns (entries, bytes) removed. Raises DercError where the store cannot be written.
        """
        if not self._writable:
            raise DercError(f"the store {self.root} cannot be written, so nothing can be removed from it")
        damaged = {key for key, _ in self.verify()}
        entries = self.entries()
        total, count, freed = sum(entry.size for entry in entries), 0, 0
        for entry in entries:
            old = older_than_days is not None and time.time() - entry.created > older_than_days * 86400
            over = max_bytes is not None and total - freed > max_bytes
            if everything or old or over or entry.key in damaged:
                self._remove(entry.key)
                count, freed = count + 1, freed + entry.size
        for folder in (self.root / "tmp").iterdir():
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > STALE_S:
                    shutil.rmtree(folder)
        return count, freed

    def _prepare(self) -> None:
        try:
            for name in ("tmp", "entries"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with self._lock(), tempfile.TemporaryDirectory(dir=self.root / "tmp"):
                pass
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in CANNOT_WRITE:
            raise error
        if self._writable:
            self._writable = False
            self._say(f"the store {self.root} cannot be written ({error.strerror}): nothing will be kept in it")

    def _lock(self) -> AbstractContextManager[Any]:
        return FileLock(self.root / ".lock") if self._writable else nullcontext()

    def _folder(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise DercError(f"{key!r} is not a store key: 16 to 64 hexadecimal digits")
        return self.root / "entries" / key[:2] / key

    def _folders(self) -> Iterator[Path]:
        for shard in sorted((self.root / "entries").glob("*")):
            yield from sorted(folder for folder in shard.glob("*") if folder.is_dir())

    def _meta(self, folder: Path) -> Entry:
        text = _read_file(folder / META, folder)
        try:
            body = json.loads(text)
            body.pop("seal")
            entry = Entry(**body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damage(folder, f"{META} is not readable") from error
        if entry.sealed() != text or entry.key != folder.name:
            raise _damage(folder, f"{META} is not what was written")
        return entry

    def _read(self, folder: Path) -> tuple[Entry, dict[str, bytes]]:
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        entry = self._meta(folder)
        blobs = {}
        for name, expected in entry.blobs.items():
            blobs[name] = _read_file(folder / name, folder)
            if hashlib.sha256(blobs[name]).hexdigest() != expected:
                raise _damage(folder, f"{name} is not what was written")
        return entry, blobs

    def _get(self, key: str, kind: str, parse: Callable[[dict[str, bytes]], T]) -> T | None:
        folder = self._folder(key)
        try:
            if not folder.is_dir():
                return None
            with self._lock():
                entry, blobs = self._read(folder)
            if entry.kind != kind:
                raise _damage(folder, f"it holds a {entry.kind}, not a {kind}")
            return parse(blobs)
        except (FileNotFoundError, PermissionError):
            return None
        except IntegrityError as error:
            if self.on_damage is None:
                raise
            self._remove(key)
            self.on_damage(f"{error}; it is made anew")
            return None

    def _put(self, key: str, kind: str, note: str, blobs: dict[str, bytes]) -> None:
        target = self._folder(key)
        if not self._writable:
            return
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in blobs.items()}
        entry = Entry(key, kind, note, sum(map(len, blobs.values())), time.time(), hashes)
        try:
            with tempfile.TemporaryDirectory(dir=self.root / "tmp") as scratch:
                new = Path(scratch) / key
                new.mkdir()
                for name, data in (blobs | {META: entry.sealed()}).items():
                    _write_file(new / name, data)
                _sync(new)
                with self._lock():
                    target.parent.mkdir(exist_ok=True)
                    if target.exists():
                        target.replace(Path(scratch) / "old")
                    new.replace(target)
                    _sync(target.parent)
        except OSError as error:
            self._give_up(error)

    def _remove(self, key: str) -> None:
        """Take an entry out in one step, then delete its files; nothing where the store only reads."""
        target = self._folder(key)
        if not self._writable:
            return
        with tempfile.TemporaryDirectory(dir=self.root / "tmp") as scratch, self._lock():
            if target.exists():
                target.replace(Path(scratch) / "old")


def _damage(folder: Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"store entry {folder.name} is damaged: {what} (`derc cache verify` lists damage, `derc cache gc` removes it)"
    )


def _read_file(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _damage(folder, f"{path.name} is missing") from error


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
