"""Reading a zoo: a TOML file with one ``[[donor]]`` table each, or names of timm networks."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from derc.donor import Donor
from derc.errors import UsageError, suggest


class DonorTable(BaseModel):
    """One ``[[donor]]`` table; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    factory: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = False
    input_size: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    labels: int | list[str] | str | None = None
    licence: str = "unknown"
    source: str = ""

    def donor(self, folder: Path) -> Donor:
        """The donor, its paths relative to `folder`; raises UsageError where fields do not fit together."""
        if self.weights is not None and self.pretrained:
            raise UsageError(f"donor {self.name} has both weights and pretrained = true: give one of them")
        if self.pretrained and not self.factory.startswith("timm:"):
            raise UsageError(f"donor {self.name}: pretrained = true is for timm:NAME; give weights for {self.factory}")
        known = timm_config(self.factory.removeprefix("timm:")) if self.pretrained else {}
        size = list(known.get("input_size", ())) if self.input_size is None else self.input_size
        if len(size) != 3 or min(size) < 1:
            raise UsageError(f"donor {self.name}: input_size must be three positive integers [C, H, W], not {size}")
        mean, std = self._normalisation(known, size[0])
        return Donor(
            name=self.name,
            factory=self.factory,
            kwargs=self.kwargs,
            weights=None if self.weights is None else folder / self.weights,
            pretrained=self.pretrained,
            input_size=(size[0], size[1], size[2]),
            mean=mean,
            std=std,
            labels=read_labels(self.labels, folder, self.name),
            licence=self.licence,
            source=self.source,
            folder=folder,
        )

    def _normalisation(self, known: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel: the file's, else timm's for pretrained weights, else none."""
        mean = tuple(self.mean if self.mean is not None else known.get("mean", (0.0,) * channels))
        std = tuple(self.std if self.std is not None else known.get("std", (1.0,) * channels))
        if len(mean) != channels or len(std) != channels or not min(std) > 0:
            raise UsageError(f"donor {self.name}: mean and std need {channels} numbers each, those of std positive")
        return mean, std


def read_labels(labels: int | list[str] | str | None, folder: Path, donor: str) -> tuple[str, ...] | None:
    """A count stands for the names "0", "1", …; a string is a file with one name per line.

    Raises UsageError for an unreadable file, a name given twice, or none at all.
    """
    if labels is None:
        return None
    if isinstance(labels, int):
        names = [str(index) for index in range(labels)]
    elif isinstance(labels, str):
        lines = read_text(folder / labels, f"donor {donor}: the labels file").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = labels
    if not names or len(set(names)) < len(names):
        raise UsageError(f"donor {donor}: labels must be at least one distinct name each, got {labels!r}")
    return tuple(names)


def read_text(path: Path, what: str) -> str:
    """The text of `path`; raises UsageError, with `what` it is, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text") from error


def read_toml(path: Path) -> tuple[Donor, ...]:
    """The donors of a zoo file; raises UsageError that says where it is wrong."""
    try:
        tree = tomllib.loads(read_text(path, "zoo file"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"zoo file {path} is not valid TOML: {error}") from error
    for key in tree:
        if key != "donor":
            hint = suggest(key, ["donor"])
            raise UsageError(f"zoo file {path}: unknown key {key!r}, only [[donor]] tables belong here{hint}")
    tables = tree.get("donor", [])
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"zoo file {path} has no donors: write a [[donor]] table for each network")
    return tuple(_table(table, path).donor(path.resolve().parent) for table in tables)


def _table(table: dict[str, Any], path: Path) -> DonorTable:
    try:
        return DonorTable.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "donor"
        name = table.get("name", "(no name)") if isinstance(table, dict) else table
        where = f"zoo file {path}, donor {name}"
        if first["type"] == "extra_forbidden":
            known = DonorTable.model_fields
            raise UsageError(f"{where}: unknown key {key!r}, known: {', '.join(known)}{suggest(key, known)}") from error
        raise UsageError(f"{where}: {key}: {first['msg']}") from error


def timm_config(name: str) -> dict[str, Any]:
    """What timm knows of the pretrained weights of `name`; raises UsageError for an unknown network or tag."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no network {architecture!r}{suggest(architecture, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UsageError(f"timm has no weights {tag!r} of {architecture}, known: {tags}{suggest(tag, tags)}")
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UsageError(f"timm knows no input size of {name}: name it in a zoo file with its input_size and weights")
    return asdict(config)


def timm_donor(name: str, checkpoint: Path | None) -> Donor:
    """A timm network with its hub weights, or with those of the file `checkpoint`."""
    config = timm_config(name)
    origin = config.get("hf_hub_id") or config.get("url")
    if checkpoint is None and not origin:
        raise UsageError(f"timm has no pretrained weights of {name}: give a file with --checkpoint")
    channels, height, width = config["input_size"]
    return Donor(
        name=name,
        factory=f"timm:{name}",
        kwargs={},
        weights=checkpoint,
        pretrained=checkpoint is None,
        input_size=(channels, height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        labels=_timm_labels(config),
        licence=config.get("license") or "unknown",
        source=checkpoint.name if checkpoint else str(origin),
    )


def _timm_labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """WordNet ids where the head is one of ImageNet's label sets, else the indices; None for a headless network."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    if subset:
        info: Any = ImageNetInfo(subset)
        return tuple(info.label_names())
    return tuple(str(index) for index in range(config["num_classes"])) or None
