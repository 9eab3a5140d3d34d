"""Reading checkpoints that others wrote: safetensors and PyTorch state dicts, never pickled code."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derc.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = Mapping[str, Tensor]

EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher")
CONTAINERS = (*EMA, "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "student")
"""Where training scripts keep a state dict, the averaged weights first."""
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "network.",
    "backbone.",
    "encoder.",
    "base_encoder.",
    "encoder_q.",
)
DEEPEST = 4
"""How many prefixes a name may have before the network's own."""
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONVERT = "convert it with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
HEADLESS = "for a backbone without its head give kwargs = { num_classes = 0 } (timm) or a class …Model (transformers)"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: a flat state dict, and `within` which containers it lay."""

    path: Path
    state: dict[str, Tensor]
    within: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        """Whether these are the averaged (EMA) weights of a training run."""
        return any(name in EMA for name in self.within)

    def __str__(self) -> str:
        if not self.within:
            return str(self.path)
        return f"{self.path} ({'EMA weights, ' if self.averaged else ''}under {'.'.join(self.within)})"


def fingerprint(path: Path) -> str:
    """SHA-256 of the checkpoint's bytes; raises UsageError for a file that is missing, empty or cannot be read."""
    state = hashlib.sha256()
    for file in weight_files(path):
        try:
            with file.open("rb") as stream:
                state.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UsageError(f"checkpoint {file} cannot be read: {error.strerror}") from error
    return state.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The files that a checkpoint consists of: itself, the shards of an index, or what a model's folder has of them.

    Raises UsageError where one is missing or empty.
    """
    if path.is_dir():
        inside = next((path / name for name in FILES if (path / name).is_file()), None)
        if inside is None:
            raise UsageError(f"checkpoint {path} is a folder without {' or '.join(FILES[:2])}: name the file")
        return weight_files(inside)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file: check the path")
    if path.stat().st_size == 0:
        raise UsageError(f"checkpoint {path} is empty: download or copy it again")
    if path.suffix != ".json":
        return [path]
    return [file for name in shard_names(path) for file in weight_files(path.parent / name)]


def shard_names(index: Path) -> list[str]:
    """The files that a shard index names, all beside it; raises UsageError for what is no such index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name and Path(name).suffix != ".json" for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"checkpoint {index} is no index of shards: download or copy it again") from error
    if not names or not plain:
        raise UsageError(f"checkpoint {index} does not name shards beside it: download or copy it again")
    return names


def load(path: Path) -> Checkpoint:
    """The state dict in `path` (a file, a shard index or a model's folder), out of its containers.

    Raises UsageError for a file that is missing, truncated, no checkpoint, or holds pickled code, which is never run.
    """
    state: dict[str, Tensor] = {}
    within: tuple[str, ...] = ()
    for file in weight_files(path):
        found, within = _unwrap(_load_safetensors(file) if _is_safetensors(file) else _load_torch(file), file)
        state |= found
    _check_finite(state, path)
    return Checkpoint(path, state, within)


def load_into(
    module: nn.Module,
    path: Path,
    drop: Iterable[str] = (),
    rename: Callable[[State], State] = lambda state: state,
) -> str:
    """Load the checkpoint `path` into `module` as `load_state_into` does, and say what was taken if that is not plain.

    Prefixes that wrappers put before the network's names are removed where the names then are the network's; else
    `rename` may know them. Entries whose name begins with one of `drop` are left out. Raises UsageError that names the
    first keys that are missing, unexpected or of another shape, and their counts; the module is then as it was.
    """
    checkpoint = load(path)
    own = module.state_dict()
    state = _fitting(own, checkpoint.state, tuple(drop))
    if any(_problems(own, state)):
        state = _fitting(own, rename(checkpoint.state), tuple(drop))
    load_state_into(module, state, str(checkpoint))
    left = len(checkpoint.state) - len(state)
    remarks = [f"EMA weights ({'.'.join(checkpoint.within)})"] if checkpoint.averaged else []
    remarks += [f"{left} of {len(checkpoint.state)} entries are not the network's and left out"] if left > 0 else []
    return "; ".join(remarks)


def _fitting(own: State, state: State, drop: tuple[str, ...]) -> State:
    """What lies in `state` under a prefix that fits the network exactly, else under the one with fewest problems."""
    tried = [_without(part, drop) for part in _under_prefixes(state, DEEPEST)]
    return min(tried, key=lambda part: sum(map(len, _problems(own, part))))


def _under_prefixes(state: State, depth: int) -> Iterator[State]:
    """`state`, and what lies in it under each known prefix, without it."""
    yield state
    for prefix in PREFIXES if depth else ():
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if part:
            yield from _under_prefixes(part, depth - 1)


def _without(state: State, drop: tuple[str, ...]) -> State:
    return {name: value for name, value in state.items() if not name.startswith(drop)} if drop else state


def _counted(name: str) -> bool:
    """Whether this is a batch norm's count of its batches, which older state dicts lack and no answer depends on."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _problems(own: State, state: State) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unexpected, and of another shape."""
    shapes = [
        f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in state and not _counted(name)]
    return missing, [name for name in state if name not in own], shapes


def load_state_into(module: nn.Module, state: State, origin: str) -> None:
    """Load `state` into `module` strictly, but for batch norms' counts of batches, which may lack and are 0 then.

    `origin` is what an error calls the checkpoint. Raises UsageError where it does not fit.
    """
    own = module.state_dict()
    missing, unexpected, shapes = _problems(own, state)
    clauses = [_clause("missing", missing), _clause("unexpected", unexpected), _clause("of another shape", shapes)]
    problems = "; ".join(clause for clause in clauses if clause)
    if problems:
        remedy = "check the factory and its kwargs (num_classes)"
        if missing and not unexpected and not shapes:
            remedy += f"; {HEADLESS}"
        if unexpected and not missing and not shapes:
            remedy += (
                f"; leave out a head that the network has not with drop = [{unexpected[0].partition('.')[0] + '.'!r}]"
            )
        raise UsageError(f"checkpoint {origin} does not fit the network: {problems}; {remedy}")
    counts = {name: value.new_zeros(value.shape) for name, value in own.items() if _counted(name)}
    module.load_state_dict({**counts, **state})


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


def _unwrap(loaded: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The flat name → tensor mapping inside the usual containers of training scripts, and which these are."""
    from torch import Tensor

    within: list[str] = []
    while isinstance(loaded, Mapping) and (key := _container(loaded)):
        within.append(key)
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise UsageError(f"checkpoint {path} holds a {type(loaded).__name__}, not a state dict: {CONVERT}")
    strange = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strange:
        raise UsageError(f"checkpoint {path} is not a state dict: {strange[0]!r} is no tensor; {CONVERT}")
    return {str(key): value for key, value in loaded.items()}, tuple(within)


def _container(tree: Mapping[Any, Any]) -> str | None:
    """The first of CONTAINERS in `tree` that leads to tensors."""
    return next((key for key in CONTAINERS if isinstance(tree.get(key), Mapping) and _leads(tree[key])), None)


def _leads(tree: Mapping[Any, Any]) -> bool:
    from torch import Tensor

    return any(isinstance(value, Tensor) for value in tree.values()) or _container(tree) is not None


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UsageError(
                f"checkpoint {path} has NaN or infinite values in {name}: its training diverged, use another"
            )
