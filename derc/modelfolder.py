"""A transformers network as it is stored: a folder or a repository of the hub with config.json and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derc import huggingface
from derc.errors import MissingDependencyError, UsageError
from derc.hub import repository_file

NOT_FIELDS = {"transformers_version", "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "problem_type"}
NOT_FIELDS |= {"id2label", "label2id", "num_labels", "_name_or_path"}


@dataclass(frozen=True)
class ModelFolder:
    """What config.json and preprocessor_config.json say of a network; None where they do not."""

    kind: str
    kwargs: dict[str, Any]
    input_size: tuple[int, int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    labels: tuple[str, ...] | None
    weights: Path | None
    repository: str


def is_stored(name: str) -> bool:
    """Whether `name` is a folder or a repository of the hub, OWNER/NAME, and not a class."""
    return "/" in name or name.startswith(".")


def read(name: str, folder: Path, offline: bool) -> ModelFolder:
    """The network stored in the folder `name`, relative to `folder`, or in the hub's repository of that name.

    Raises UsageError for what is no image network, MissingDependencyError where the hub cannot be reached.
    """
    place = (folder / name).expanduser()
    local = place.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UsageError(f"transformers:{name} is not a folder with a model: {place} does not exist")
    config = _json(place / "config.json" if local else repository_file(name, ["config.json"], name, offline))
    processor = _processor(place, name, local, offline)
    return described(config, processor, place if local else None, "" if local else name)


def _processor(place: Path, name: str, local: bool, offline: bool) -> dict[str, Any]:
    file = "preprocessor_config.json"
    if local:
        return _json(place / file) if (place / file).is_file() else {}
    try:
        return _json(repository_file(name, [file], name, offline))
    except MissingDependencyError:
        return {}


def described(config: dict[str, Any], processor: dict[str, Any], weights: Path | None, repository: str) -> ModelFolder:
    """What the two files say together."""
    kind = next(iter(config.get("architectures") or ()), "")
    if not kind:
        raise UsageError("config.json names no architecture: give the class, transformers:NAME, and its weights")
    known = huggingface.network_class(kind).config_class.from_dict(config)
    empty = type(known)()
    fields = {
        key: value
        for key, value in known.to_diff_dict().items()
        if key not in NOT_FIELDS and hasattr(empty, key) and getattr(empty, key) != value
    }
    classifies = "ForImageClassification" in kind
    labels = tuple(known.id2label[index] for index in range(known.num_labels)) if classifies else None
    side = getattr(known, "image_size", None) or processor.get("crop_size") or processor.get("size")
    return ModelFolder(
        kind=kind,
        kwargs=fields | ({"num_labels": known.num_labels} if classifies else {}),
        input_size=_size(side, getattr(known, "num_channels", 3)),
        mean=_three(processor, "image_mean", 0.0),
        std=_three(processor, "image_std", 1.0),
        labels=_named(labels),
        weights=weights,
        repository=repository,
    )


def _named(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The labels, or their indices where they are transformers' placeholders or not distinct."""
    if labels is None or (len(set(labels)) == len(labels) and labels[0] != "LABEL_0"):
        return labels
    return tuple(str(index) for index in range(len(labels)))


def _size(side: Any, channels: int) -> tuple[int, int, int] | None:
    """(C, H, W) of a number, a pair, or a mapping with height and width or the shortest edge."""
    if isinstance(side, dict):
        side = [side["height"], side["width"]] if "height" in side else side.get("shortest_edge")
    if isinstance(side, int):
        side = [side, side]
    if not isinstance(side, (list, tuple)) or len(side) != 2:
        return None
    return channels, int(side[0]), int(side[1])


def _three(processor: dict[str, Any], key: str, neutral: float) -> tuple[float, ...] | None:
    """The normalisation that the image processor does; None where nothing is known of it."""
    if not processor:
        return None
    if not processor.get("do_normalize", True):
        return (neutral,) * 3
    found = processor.get(key)
    return None if found is None else tuple(float(value) for value in found)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object")
    return found
