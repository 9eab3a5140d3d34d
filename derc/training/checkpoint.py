"""The work folder of a training: its state in safetensors and JSON, always whole, bound to one command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from derc.errors import IntegrityError, UsageError

STATE, COMMAND = "state.json", "command.json"
SCHEMA = 1


class Work:
    """A folder that holds the latest state of the training that `command`, any JSON value, describes."""

    def __init__(self, folder: Path, command: Any) -> None:
        self.folder = folder
        self.command = json.loads(json.dumps(command))
        self.lock = FileLock(f"{folder}.lock")

    def open(self) -> None:
        """Take the folder, or make it; raises UsageError where another training or process has it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"another process is training in {self.folder}: wait for it, or name another -o"
            ) from error
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def _claim(self) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / COMMAND
        if not path.exists():
            _write(path, json.dumps(self.command).encode())
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != self.command:
            changed = [name for name in self.command if known.get(name) != self.command[name]]
            raise UsageError(
                f"{self.folder} holds a training that another command began ({', '.join(changed) or 'other options'} "
                "differ): give that command again to go on, remove the folder, or name another -o"
            )

    def close(self) -> None:
        """Give the folder back; it stays where it, or a folder in it, holds a state."""
        if not any(self.folder.rglob(STATE)):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state of nested dicts and lists of tensors and scalars in place of the one before."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _without_tensors(state, tensors)
        before = self._current()
        name = f"state-{0 if before is None else before['number'] + 1}.safetensors"
        scratch = self.folder / f"{name}.part"
        save_file(tensors, scratch)
        _settle(scratch, self.folder / name)
        number = 0 if before is None else before["number"] + 1
        document = {"schema": SCHEMA, "number": number, "tensors": name, "state": tree}
        _write(self.folder / STATE, json.dumps(document).encode())
        for old in self.folder.glob("state-*.safetensors*"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The last state that was kept; None where there is none, raises IntegrityError where it is damaged."""
        document = self._current()
        if document is None:
            return None
        try:
            tensors = load_file(self.folder / document["tensors"])
            found: dict[str, Any] = _with_tensors(document["state"], tensors)
        except (OSError, KeyError, SafetensorError) as error:
            raise IntegrityError(f"the checkpoint in {self.folder} is damaged ({error}): remove that folder") from error
        return found

    def _current(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise IntegrityError(f"the checkpoint in {self.folder} is damaged ({error}): remove that folder") from error
        return found


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, in which its tensors are names; raises UsageError for what is neither tensor nor scalar."""
    match value:
        case torch.Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"$tensor": name}
        case dict():
            return {"$items": [[key, _without_tensors(one, tensors)] for key, one in value.items()]}
        case list() | tuple():
            return [_without_tensors(one, tensors) for one in value]
        case None | bool() | int() | float() | str():
            return value
    raise UsageError(f"the optimiser keeps a {type(value).__name__}, which cannot be checkpointed: choose another one")


def _with_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_with_tensors(one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    return {key: _with_tensors(one, tensors) for key, one in tree["$items"]}


def _write(path: Path, data: bytes) -> None:
    """Put a file there whole or not at all."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_bytes(data)
    _settle(scratch, path)


def _settle(scratch: Path, path: Path) -> None:
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
