"""The bundle: the directory that a compile writes, its manifest and its integrity."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 1
MANIFEST = "manifest.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of renameat2(2): paths are relative to the working directory, and change places."""
FILES = ("model.py", "weights.safetensors", "model.onnx", "plan.txt", "report.html", "reproduce.sh")
"""What every bundle holds besides the manifest and the engine."""


def check_output(output: Path) -> None:
    """Raise UsageError unless a bundle can be written at `output`: a new path, or an empty directory."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"the output {output} exists and is not a directory: name another one with -o")
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"the output directory {output} is not empty: name another one with -o, or empty it")
    check_place(output.absolute().parent, f"the output {output}")


def check_place(place: Path, what: str) -> None:
    """Raise UsageError unless the folder `place`, or the nearest one above it that exists, can be written into."""
    while not place.exists():
        place = place.parent
    try:
        Path(tempfile.mkdtemp(prefix=".derc.", dir=place)).rmdir()
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {place}: {error.strerror}") from error


def write(output: Path, files: Mapping[str, bytes], manifest: dict[str, Any], *, over: bool = False) -> dict[str, Any]:
    """Write a bundle so that it appears whole or not at all; returns the manifest with digests.

    With `over` it takes the place of the bundle that is at `output`.
    """
    if not over:
        check_output(output)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    sealed = seal({**manifest, "files": {name: sha256(data) for name, data in sorted(files.items())}})
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for name, data in {**files, MANIFEST: json.dumps(sealed, indent=1).encode() + b"\n"}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if "reproduce.sh" in files:
            (folder / "reproduce.sh").chmod(0o755)
        folder.chmod(0o755)
        _put(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sealed


def _put(folder: Path, output: Path) -> None:
    """Move a whole bundle to `output`, in one step with what is there where the system can exchange two folders.

    Where it cannot, what is there goes aside first, and comes back where the move fails.
    """
    if not output.exists():
        folder.replace(output)
        return
    if _exchange(folder, output):
        shutil.rmtree(folder, ignore_errors=True)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)) / "before"
    try:
        output.replace(aside)
        folder.replace(output)
    except BaseException:  # an interruption, too, must not cost the bundle that was there
        if aside.exists() and not output.exists():
            aside.replace(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(aside.parent, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders of one file system change places (Linux, renameat2); whether that was possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of itself."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return {**body, "seal": sha256(json.dumps(body, sort_keys=True).encode())}


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle; raises IntegrityError where `folder` is none or the manifest was changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder} is not a derc bundle: {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or "schema" not in manifest or "files" not in manifest:
        raise IntegrityError(f"{folder} is not a derc bundle: {MANIFEST} has no schema")
    if manifest["schema"] != SCHEMA:
        raise IntegrityError(
            f"{folder} has manifest schema {manifest['schema']}, this derc reads {SCHEMA}: upgrade derc"
        )
    if seal(manifest) != manifest:
        raise IntegrityError(f"{folder / MANIFEST} was changed after it was written: compile again")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a bundle against its digest; returns the manifest, raises IntegrityError."""
    manifest = read(folder)
    for name, digest in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise IntegrityError(f"{folder}: the manifest names a file outside the bundle ({name})")
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{folder}: {name} is missing: compile again")
        if sha256(path.read_bytes()) != digest:
            raise IntegrityError(f"{folder}: {name} is not what derc wrote: compile again, or restore it")
    return manifest


def load(folder: Path, num_classes: int | None = None) -> nn.Module:
    """The bundle's module in eval mode, after `verify`; `num_classes` gives it a fresh head."""
    verify(folder)
    from derc.emitted import imported

    with imported(folder / "model.py") as module:
        network: nn.Module = module.build(num_classes)
    return network
