"""Reading a zoo: a TOML file with one ``[[donor]]`` table each, or names of a library's networks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from derc.donor import Donor
from derc.errors import UsageError, suggest
from derc.factories import ONNX, naming
from derc.known import Known, is_stored, known, of_file


class DonorTable(BaseModel):
    """One ``[[donor]]`` table; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    factory: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    drop: list[str] = Field(default_factory=list)
    pretrained: bool = False
    input_size: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    labels: int | list[str] | str | None = None
    licence: str = "unknown"
    source: str = ""

    def donor(self, folder: Path, offline: bool = False) -> Donor:
        """The donor, its paths relative to `folder`; raises UsageError where fields do not fit together."""
        if self.weights is not None and self.pretrained:
            raise UsageError(f"donor {self.name} has both weights and pretrained = true: give one of them")
        if self.drop and self.weights is None:
            raise UsageError(f"donor {self.name}: drop leaves out entries of a checkpoint, and weights names none")
        if self.factory.startswith(f"{ONNX}:") and (self.weights is not None or self.pretrained):
            raise UsageError(f"donor {self.name}: an ONNX file holds its weights: leave out weights and pretrained")
        said = self._said(folder, offline)
        size = list(said.input_size or ()) if self.input_size is None else self.input_size
        if len(size) != 3 or min(size) < 1:
            raise UsageError(f"donor {self.name}: input_size must be three positive integers [C, H, W], not {size}")
        mean, std = self._normalisation(said, size[0])
        own = "num_classes" in self.kwargs or "num_labels" in self.kwargs
        labels = said.labels if self.labels is None and not own else read_labels(self.labels, folder, self.name)
        return Donor(
            name=self.name,
            factory=said.factory,
            kwargs={**said.kwargs, **self.kwargs},
            weights=said.weights if self.weights is None else folder / self.weights,
            drop=tuple(self.drop),
            pretrained=self.pretrained or (bool(said.repository) and self.weights is None),
            repository=said.repository,
            input_size=(size[0], size[1], size[2]),
            mean=mean,
            std=std,
            labels=labels,
            licence=said.licence if self.licence == "unknown" else self.licence,
            source=self.source or (said.source if self.weights is None else ""),
            folder=folder,
            offline=offline,
        )

    def _said(self, folder: Path, offline: bool) -> Known:
        """What the library says, asked only where its weights are taken: other weights may want other images."""
        if self.factory.startswith(f"{ONNX}:"):
            with naming(self.name):
                return of_file(self.factory, folder, self.input_size)
        if not (self.pretrained or is_stored(self.factory)):
            return Known(self.factory)
        with naming(self.name):
            return known(self.factory, folder, offline)

    def _normalisation(self, said: Known, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel: the file's, else the library's for its weights, else none."""
        if is_stored(self.factory) and said.mean is None and self.mean is None:
            raise UsageError(
                f"donor {self.name}: {self.factory} does not say how images are normalised: give mean, std"
            )
        mean = tuple((0.0,) * channels if said.mean is None else said.mean) if self.mean is None else tuple(self.mean)
        std = tuple((1.0,) * channels if said.std is None else said.std) if self.std is None else tuple(self.std)
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


def read_toml(path: Path, offline: bool = False) -> tuple[Donor, ...]:
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
    return tuple(_table(table, path).donor(path.resolve().parent, offline) for table in tables)


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


def file_donor(path: str) -> Donor:
    """An ONNX file's network for images as they are, called as the file is."""
    return DonorTable(name=Path(path).stem, factory=f"{ONNX}:{path}").donor(Path.cwd())


def library_donor(factory: str, checkpoint: Path | None, offline: bool) -> Donor:
    """A library's network with the weights that it publishes, or with those of the file `checkpoint`."""
    said = known(factory, Path.cwd(), offline)
    if checkpoint is None and not said.source:
        raise UsageError(f"there are no pretrained weights of {factory}: give a file with --checkpoint")
    if said.input_size is None or said.mean is None or said.std is None:
        raise UsageError(
            f"{factory} does not say what images it takes: name it in a zoo file with input_size, mean, std"
        )
    return Donor(
        name=factory.partition(":")[2].strip("./").replace("/", "-"),
        factory=said.factory,
        kwargs=said.kwargs,
        weights=checkpoint or said.weights,
        pretrained=checkpoint is None and said.weights is None,
        repository=said.repository,
        input_size=said.input_size,
        mean=said.mean,
        std=said.std,
        labels=said.labels,
        licence=said.licence,
        source=checkpoint.name if checkpoint else said.source,
        offline=offline,
    )
