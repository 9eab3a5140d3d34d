"""Reading checkpoints that others wrote: safetensors and PyTorch state dicts, never pickled code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "backbone.")
CONVERT = "convert it with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"


def read_bytes(path: Path) -> bytes:
    """The checkpoint's bytes; raises UsageError for a file that is missing, empty or cannot be read."""
    _check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error.strerror}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file: check the path")
    if path.stat().st_size == 0:
        raise UsageError(f"checkpoint {path} is empty: download or copy it again")


def load_state(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, out of its container and without the prefixes that all its names share.

    Raises UsageError for a file that is missing, truncated, no checkpoint, or holds pickled code, which is never run.
    """
    _check_file(path)
    loaded = _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    state = _strip(_unwrap(loaded, path))
    _check_finite(state, path)
    return state


def load_into(module: nn.Module, path: Path) -> None:
    """Load the checkpoint `path` into `module` strictly.

    Raises UsageError that names the first keys that are missing, unexpected or of another shape, and their counts.
    """
    load_state_into(module, load_state(path), str(path))


def load_state_into(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load `state` into `module` strictly; `origin` is what an error calls the checkpoint."""
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    clauses = [
        _clause("missing", [name for name in own if name not in state]),
        _clause("unexpected", [name for name in state if name not in own]),
        _clause("of another shape", shapes),
    ]
    problems = "; ".join(clause for clause in clauses if clause)
    if problems:
        raise UsageError(
            f"checkpoint {origin} does not fit the network: {problems}; check the factory and its kwargs (num_classes)"
        )
    module.load_state_dict(state)


def _clause(what: str, keys: list[str]) -> str:
    more = ", …" if len(keys) > 3 else ""
    return f"{len(keys)} {what} ({', '.join(keys[:3])}{more})" if keys else ""


def _is_safetensors(path: Path) -> bool:
    """By name, or by content: eight bytes of header length, then a JSON object."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"checkpoint {path} is truncated or not a safetensors file ({error}): download or copy it again"
        ) from error
    return state


def _load_torch(path: Path) -> Any:
    """What torch.load makes of `path` when it may only make tensors and containers."""
    import torch

    with path.open("rb") as file:
        head = file.read(2)
    zipped = head == b"PK"
    if not zipped and head[:1] != b"\x80":
        raise UsageError(f"{path} is not a checkpoint: safetensors or a PyTorch state dict is expected")
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises errors of many kinds on foreign bytes
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            reason = f"holds pickled code, which derc does not run: where you trust it, {CONVERT}"
        elif zipped:
            reason = "is truncated, damaged or no checkpoint: download or copy it again"
        else:
            reason = "is truncated or not a checkpoint: safetensors or a PyTorch state dict is expected"
        raise UsageError(f"checkpoint {path} {reason}") from error


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The flat name → tensor mapping inside the usual containers of training scripts."""
    from torch import Tensor

    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise UsageError(f"checkpoint {path} holds a {type(loaded).__name__}, not a state dict: {CONVERT}")
    strange = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strange:
        raise UsageError(f"checkpoint {path} is not a state dict: {strange[0]!r} is no tensor; {CONVERT}")
    return {str(key): value for key, value in loaded.items()}


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UsageError(
                f"checkpoint {path} has NaN or infinite values in {name}: its training diverged, use another"
            )
