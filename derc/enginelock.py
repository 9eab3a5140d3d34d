"""The lock beside an engine that is bound to a device: what it was built on, by what, and which bytes it is.

A serialised engine is code: it is deserialised only where its bytes are those that derc wrote, and only on the device
and by the versions that it was built for.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from derc.errors import IntegrityError, MissingDependencyError

SCHEMA = 1
REBUILD = "build the engine anew on this machine with `derc build`"

BOUND = {
    "onnxruntime": ("onnxruntime", "provider", "device", "machine"),
    "onnxruntime:cuda": ("onnxruntime", "provider", "device"),
    "inductor": ("torch", "capability", "device", "machine"),
    "inductor:cuda": ("torch", "cuda", "device", "compute_capability"),
    "tensorrt": ("tensorrt", "cuda", "device", "compute_capability"),
}
"""What must agree where an engine is loaded, by engine and variant; any other engine's file runs everywhere.

The driver is recorded alone, for newer drivers run older engines.
"""


@dataclass(frozen=True)
class EngineLock:
    """`engine` is what the engine says of itself and its device; `bound` names the entries that must agree to load it.

    `options` are the builder's, `precision` names the formats that the network is computed in.
    """

    sha256: str
    size: int
    engine: dict[str, str]
    bound: tuple[str, ...]
    precision: str
    options: dict[str, str]
    schema: int = SCHEMA


def bound(described: Mapping[str, str]) -> tuple[str, ...]:
    """What binds the file of the engine that is `described`: entries of its description, none where it is portable."""
    return BOUND.get(":".join(filter(None, (described.get("engine"), described.get("variant")))), ())


def lock(
    engine: bytes, described: Mapping[str, str], precision: str, options: Mapping[str, str] | None = None
) -> EngineLock:
    """The lock of the bytes `engine`, built by the engine that describes itself as `described`."""
    return EngineLock(_sha256(engine), len(engine), dict(described), bound(described), precision, dict(options or {}))


def beside(engine: Path, described: Mapping[str, str], precision: str) -> str:
    """The text of the lock that belongs beside a built engine: the one its builder wrote, or one made here.

    Empty where nothing binds the file to a device or to versions.
    """
    if place(engine).exists():
        return place(engine).read_text(encoding="utf-8")
    return to_json(lock(engine.read_bytes(), described, precision)).decode() if bound(described) else ""


def place(engine: Path) -> Path:
    """Where the lock of an engine's file lies: ``engine.lock.json`` beside ``engine.plan``."""
    return engine.with_suffix(".lock.json")


def to_json(made: EngineLock) -> bytes:
    """Canonical text: equal locks give equal bytes."""
    return json.dumps(asdict(made), indent=1, sort_keys=True).encode() + b"\n"


def from_json(data: bytes, name: str) -> EngineLock:
    """Inverse of `to_json`; `name` is what errors call the file.

    Raises IntegrityError where it is no lock, or one of another schema.
    """
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{name} is not an engine's lock: {REBUILD}") from error
    if isinstance(tree, dict) and tree.get("schema", SCHEMA) != SCHEMA:
        raise IntegrityError(f"{name} has lock schema {tree['schema']}, this derc reads {SCHEMA}: {REBUILD}")
    if not isinstance(tree, dict) or not _well_formed(tree):
        raise IntegrityError(f"{name} is not an engine's lock: {REBUILD}")
    return EngineLock(**{**tree, "bound": tuple(tree["bound"])})


def write(engine: bytes, path: Path, made: EngineLock) -> None:
    """Write `engine` to `path` and its lock beside it, each in one step, the lock first.

    Whatever breaks in between leaves an engine that its lock does not admit.
    """
    for target, data in ((place(path), to_json(made)), (path, engine)):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        finally:
            with suppress(FileNotFoundError):
                Path(name).unlink()


def read(path: Path, described: Mapping[str, str]) -> bytes:
    """The bytes of the engine at `path`, which its lock admits on this machine, `described` by the engine here.

    Raises IntegrityError where engine or lock is missing, truncated or changed, MissingDependencyError where it was
    built for another device or by other versions.
    """
    try:
        made = from_json(place(path).read_bytes(), str(place(path)))
        engine = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{error.filename} cannot be read ({error.strerror}): {REBUILD}") from error
    check(engine, made, described, str(path))
    return engine


def check(engine: bytes, made: EngineLock, described: Mapping[str, str], name: str) -> None:
    """Raise unless the lock `made` admits the bytes `engine` on the machine that is `described`; see `read`."""
    if len(engine) < made.size:
        raise IntegrityError(f"{name} is cut short, {len(engine)} of {made.size} bytes: restore it, or {REBUILD}")
    if _sha256(engine) != made.sha256:
        raise IntegrityError(f"{name} is not what derc wrote: restore it, or {REBUILD}")
    for entry in made.bound:
        built, here = made.engine.get(entry, "unknown"), described.get(entry, "unknown")
        if built != here:
            raise MissingDependencyError(
                f"{name} was built for {entry.replace('_', ' ')} {built}, and this machine has {here}: {REBUILD}"
            )


def _well_formed(tree: dict[str, Any]) -> bool:
    texts = all(isinstance(tree.get(name), str) for name in ("sha256", "precision"))
    tables = all(
        isinstance(tree.get(name), dict) and all(isinstance(value, str) for value in tree[name].values())
        for name in ("engine", "options")
    )
    bound = isinstance(tree.get("bound"), list) and all(isinstance(name, str) for name in tree["bound"])
    return (
        set(tree) == {f.name for f in fields(EngineLock)} and texts and tables and bound and type(tree["size"]) is int
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
