"""A latency table as a file that is carried from one machine to another: what was measured, where, how and how well."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from derc import exporting
from derc.artifacts import Latency, digest
from derc.bundle import seal
from derc.errors import IntegrityError, UsageError
from derc.target import Device
from derc.workload import Work

SCHEMA = 1
KIND = "derc latency table"
SAMPLES = ".samples.jsonl"
BLOCK = re.compile(r"(?P<donor>.+)\[(?P<first>\d+):(?P<last>\d+)\](?:@(?P<precision>\w+))?")
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Text = dict[str, str]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=False)


class DonorRecord(_Record):
    """Which network a donor was: the digest of its weights and architecture, and the names of its cuts."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    cuts: tuple[str, ...]


class WorkRecord(_Record):
    """See derc.workload.Work."""

    kernels: Count
    macs: Count
    depthwise: Count
    bytes: Count

    def work(self) -> Work:
        return Work(**self.model_dump())


class Entry(_Record):
    """One latency; `key` is the digest of what was measured, `percentiles_ms` are those that the samples allow."""

    kind: Literal["donor", "block", "stitch"]
    name: str
    key: str
    ms: Milliseconds
    low_ms: Share
    high_ms: Milliseconds
    provenance: Literal["measured", "predicted"]
    samples: Count
    stable: bool
    percentiles_ms: dict[str, Milliseconds] = {}
    work: WorkRecord | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Entry:
        if not self.low_ms <= self.ms <= self.high_ms:
            raise ValueError(f"the interval {self.low_ms} to {self.high_ms} does not hold the median {self.ms}")
        return self

    def latency(self, provenance: str) -> Latency:
        """As a latency of another provenance."""
        return Latency(self.ms, self.low_ms, self.high_ms, provenance, self.samples, self.stable)


class TableFile(_Record):
    """The file; `device` is what the target's own file said of it, `machine` what could be read where it was measured.

    `engine` is the engine's own description, `spec` its name and variant. `more` holds the table's other fields.
    """

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["derc latency table"]
    derc: str
    created: str
    target: str
    device: Device
    spec: str
    threads: Count
    batch: Annotated[int, Field(ge=1)]
    engine: Text
    machine: Text
    exporter: Text
    options: dict[str, float]
    noise: Share
    donors: dict[str, DonorRecord]
    entries: tuple[Entry, ...]
    more: dict[str, Any]
    seal: str

    @model_validator(mode="after")
    def _whole(self) -> TableFile:
        seen = set[tuple[str, str]]()
        for entry in self.entries:
            if (entry.kind, entry.name) in seen:
                raise ValueError(f"{entry.kind} {entry.name} stands there twice")
            seen.add((entry.kind, entry.name))
            if entry.key != entry_key(entry.kind, entry.name, self.donors, self.batch, self.exporter):
                raise ValueError(f"the key of {entry.kind} {entry.name} is not that of what it names")
        return self


def entry_key(kind: str, name: str, donors: Mapping[str, DonorRecord], batch: int, exporter: Text) -> str:
    """Digest of what an entry measured; raises ValueError where its name is of none of the `donors`."""
    if kind == "stitch":
        return stitch_key(name, batch, exporter)
    record = donors.get(span(name)[0] if kind == "block" else name)
    if record is None:
        raise ValueError(f"{kind} {name} is of no donor that the table lists")
    _, first, last, precision = span(name) if kind == "block" else (name, 0, len(record.cuts) - 1, "fp32")
    if not first < last < len(record.cuts):
        raise ValueError(f"{kind} {name} is not within the {len(record.cuts)} cuts of its donor")
    ends = record.cuts[first], record.cuts[last]
    return block_key(record.digest, (first, last), ends, precision, batch, exporter)


def span(name: str) -> tuple[str, int, int, str]:
    """Donor, first cut, last cut and precision of a block by its name; raises ValueError where it is no block's."""
    match = BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a block")
    return match["donor"], int(match["first"]), int(match["last"]), match["precision"] or "fp32"


def block_key(
    donor: str, places: tuple[int, int], ends: tuple[str, str], precision: str, batch: int, exporter: Text
) -> str:
    """Digest of a block: its donor's digest, the numbers and names of its cuts, precision, batch size and exporter."""
    return digest(["block", donor, list(places), list(ends), precision, batch, dict(sorted(exporter.items()))])


def stitch_key(name: str, batch: int, exporter: Text) -> str:
    """Digest of a stitch's shape, batch size and exporter; a stitch's latency does not depend on its weights."""
    return digest(["stitch", name, batch, dict(sorted(exporter.items()))])


def exporter_versions() -> Text:
    """The exporter's versions without the builds' own parts: 2.14.1+cpu and 2.14.1+cu130 export alike."""
    return {name: version.partition("+")[0] for name, version in exporting.versions().items()}


def text(table: TableFile) -> str:
    """The file's text: JSON of one line a value, so that two tables can be compared."""
    return json.dumps(table.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def write(table: TableFile, path: Path, samples: Mapping[str, Iterable[float]] | None = None) -> None:
    """Write the table, and its raw samples beside it, each whole or not at all.

    The samples are one JSON line an entry, in seconds and in order of time. Raises UsageError where that is impossible.
    """
    try:
        if samples:
            replace_file(samples_path(path), sample_lines(samples))
        replace_file(path, text(table))
    except OSError as error:
        raise UsageError(f"the latency table cannot be written to {path}: {error.strerror}") from error


def sample_lines(samples: Mapping[str, Iterable[float]]) -> str:
    """Raw samples as JSON lines, seconds in order of time, one line for each thing that was measured."""
    lines = (
        json.dumps({"name": name, "seconds": [float(value) for value in values]}) for name, values in samples.items()
    )
    return "".join(f"{line}\n" for line in lines)


def samples_path(path: Path) -> Path:
    """Where the raw samples of the table at `path` are: ``table.samples.jsonl``."""
    return path.with_name(path.stem + SAMPLES)


def replace_file(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()


def read(path: Path) -> TableFile:
    """The table in the file `path`.

    Raises UsageError where it cannot be read, IntegrityError where it is no table, of another schema, or was changed.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the latency table {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path} is not a latency table of derc: it is no text") from error
    return parse(content, str(path))


def parse(content: str, where: str) -> TableFile:
    """The table in `content`, which is called `where` in errors; see `read`."""
    try:
        body = json.loads(content, parse_constant=_refuse)
    except ValueError as error:
        raise IntegrityError(f"{where} is not a whole latency table: {error}; copy it again") from error
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise IntegrityError(f"{where} is not a latency table of derc: derc profile -o writes one")
    if body.get("schema") != SCHEMA:
        raise IntegrityError(
            f"{where} has table schema {body.get('schema')}, this derc reads {SCHEMA}: measure it again with this one"
        )
    try:
        table = TableFile.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise IntegrityError(f"{where} is not a latency table of derc: {_complaint(error)}") from error
    if seal(body) != body:
        raise IntegrityError(f"{where} was changed after it was written: measure again, or copy the original")
    return table


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which no latency is")


def _complaint(error: ValidationError) -> str:
    """The first fault, with the field that it is in."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
