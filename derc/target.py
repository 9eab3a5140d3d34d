"""What the network will run on: a device, read from a TOML file, and an engine on it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from derc.devices import Gpu, gpus
from derc.engine import PRECISIONS
from derc.errors import DercError, MissingDependencyError, UsageError, suggest

SHIPPED = Path(__file__).parent / "targets"
RATES = (*PRECISIONS, "tf32")
"""What a peak rate may be given for; tf32 is what a GPU's tensor cores make of float32."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Device:
    """What a target file says of a device.

    `peaks` are dense tera-operations a second by precision, two for a multiply-accumulate; of one core where
    `per_thread`. `bandwidth` is in GB/s, `memory` in GB and `l2` in MB (None: unknown), `overhead` in µs an operator.
    `gpu` is a pattern of its name, empty for a processor, which any machine has. `sources` tell where figures are from.
    """

    description: str
    kind: str
    peaks: Mapping[str, float]
    bandwidth: float
    overhead: float
    sources: Mapping[str, str]
    per_thread: bool = False
    memory: float | None = None
    l2: float | None = None
    gpu: str = ""
    capability: str = ""
    memory_range: tuple[float, float] | None = None

    def matches(self, gpu: Gpu) -> bool:
        """Whether a GPU is this device; a part of one (MIG) never is."""
        if not self.gpu or gpu.partitioned or not re.search(self.gpu, gpu.name):
            return False
        low, high = self.memory_range or (0.0, float("inf"))
        return low <= gpu.memory_gb <= high and self.capability in ("", gpu.capability)


@dataclass(frozen=True)
class Target:
    """A device with an engine; `threads` 0 means the physical cores, `batch` is the static batch size.

    `file` is the path of the user's own description, where it was given by path.
    """

    name: str
    engine: str = "onnxruntime"
    threads: int = 0
    batch: int = 1
    device: Device | None = None
    file: str = field(default="", compare=False)

    @classmethod
    def load(cls, name: str, *, threads: int = 0, batch: int = 1, folder: Path | None = None) -> Target:
        """The target called `name`, shipped or in the user's `folder`, or that of a file ``path/to/mine.toml``.

        The device need not be here: see `present` and `require`. Raises UsageError for an unknown name or a bad file.
        """
        folder = user_folder() if folder is None else folder
        if name.endswith(".toml") or os.sep in name:
            described, file = read(Path(name)), str(Path(name).absolute())
        elif (path := found(folder).get(name)) is not None:
            described, file = read(path), ""
        else:
            known = found(folder)
            raise UsageError(
                f"unknown target {name!r}, known: {', '.join(known)}{suggest(name, known)}; a file describes another: "
                "--target path/to/mine.toml"
            )
        return cls(described.name, described.engine, threads, batch, described.device(), file)

    @property
    def known(self) -> Device:
        """What is known of the device; raises DercError for a target that no file describes."""
        if self.device is None:
            raise DercError(f"target {self.name} has no device description: take it from Target.load")
        return self.device

    @property
    def present(self) -> bool:
        """Whether this machine has the device."""
        return self.device is None or not self.device.gpu or any(map(self.device.matches, gpus()))

    def require(self) -> None:
        """Raise MissingDependencyError, saying what is here instead, unless this machine has the device."""
        if not self.present and self.device is not None:
            here = ", ".join(gpu.name + (" (a MIG part)" if gpu.partitioned else "") for gpu in gpus())
            has = f"this machine has {here}" if here else "this machine has no NVIDIA GPU that can be used"
            raise MissingDependencyError(
                f"target {self.name} is {self.device.description}, and {has}: compile for this machine's "
                "processor with --target cpu, or bound the size with --params-m or --macs-g there"
            )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Match(_Table):
    gpu: str = ""
    capability: str = ""
    memory_gb: tuple[Positive, Positive] | None = None

    @field_validator("gpu")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"must be a regular expression ({error})") from error
        return value


class _Memory(_Table):
    bandwidth_gb_s: Positive
    size_gb: Positive | None = None
    l2_mb: Positive | None = None


class _Launch(_Table):
    overhead_us: Positive


class TargetFile(_Table):
    """A target file as it is written."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    description: str = Field(min_length=1)
    kind: Literal["cpu", "gpu"]
    engine: str = Field(min_length=1)
    match: _Match = _Match()
    per_thread: bool = False
    peak: dict[str, Positive]
    memory: _Memory
    launch: _Launch
    source: dict[str, Annotated[str, Field(min_length=1)]]

    @model_validator(mode="after")
    def _whole(self) -> TargetFile:
        unknown = [key for key in self.peak if key not in RATES]
        if unknown:
            raise ValueError(f"[peak] {unknown[0]} is an unknown precision, known: {', '.join(RATES)}")
        if "fp32" not in self.peak:
            raise ValueError("[peak] needs fp32")
        if (self.kind == "gpu") != bool(self.match.gpu):
            raise ValueError("[match] gpu, a pattern of its name, belongs to kind 'gpu' and to no other")
        needed = ["peak", "memory", "launch"] + (["l2"] if self.memory.l2_mb is not None else [])
        missing = [name for name in needed if name not in self.source]
        if missing:
            raise ValueError(f"[source] must say where the figures of {', '.join(missing)} are from")
        return self

    def device(self) -> Device:
        """The same as a device."""
        return Device(
            description=self.description,
            kind=self.kind,
            peaks=self.peak,
            bandwidth=self.memory.bandwidth_gb_s,
            overhead=self.launch.overhead_us,
            sources=self.source,
            per_thread=self.per_thread,
            memory=self.memory.size_gb,
            l2=self.memory.l2_mb,
            gpu=self.match.gpu,
            capability=self.match.capability,
            memory_range=self.match.memory_gb,
        )


def user_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where the user's own target files are: `derc/targets` in the XDG configuration folder."""
    base = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "derc" / "targets"


def found(folder: Path) -> dict[str, Path]:
    """Target files by name, cpu first: the shipped ones, then the user's in `folder`, which may not replace those.

    Raises UsageError where the user's file has a shipped one's name.
    """
    shipped = {
        path.stem: path for path in sorted(SHIPPED.glob("*.toml"), key=lambda path: (path.stem != "cpu", path.stem))
    }
    own = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    for name in own.keys() & shipped.keys():
        raise UsageError(f"{own[name]} has the name of a target that derc ships: rename the file and the name in it")
    return shipped | own


def read(path: Path) -> TargetFile:
    """The target in the file `path`; raises UsageError that says which line or field is wrong."""
    try:
        described = TargetFile.model_validate(_tree(path))
    except ValidationError as error:
        raise UsageError(f"target {path}, {_complaint(error)}") from error
    if described.name != path.stem:
        raise UsageError(f"target {path}: its name is {described.name!r}, and must be that of the file, {path.stem!r}")
    return described


def _tree(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"target {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"target {path} is not valid TOML: {error}") from error


def _complaint(error: ValidationError) -> str:
    """The first fault as `[table] field: what is wrong`."""
    first = error.errors()[0]
    *tables, name = [str(part) for part in first["loc"]] or ["the whole"]
    where = "".join(f"[{table}] " for table in tables) + name
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is an unknown key"
    elif first["type"] == "missing":
        message = "is missing"
    return f"{where}: {message[0].lower()}{message[1:]}"
