"""What `derc targets` prints: a JSON value and a text for each command."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from derc.errors import IntegrityError, UsageError
from derc.shelf import Shelf
from derc.tables import Entry, TableFile, read, replace_file
from derc.target import Device, Target, found, user_folder
from derc.target import read as read_target

Shown = tuple[dict[str, Any], str]


def listed(shelf: Shelf, folder: Path | None = None) -> Shown:
    """Targets, with whether this machine is one, and imported tables; a damaged table is listed as such."""
    folder = user_folder() if folder is None else folder
    names = found(folder)
    loaded = [Target.load(name, folder=folder) for name in names]
    rows = [
        {"name": t.name, "kind": t.known.kind, "engine": t.engine, "here": t.present, "about": t.known.description}
        for t in loaded
    ]
    tables = [_summary(shelf, name) for name in shelf.names()]
    lines = ["targets"]
    for row in rows:
        mark = "here" if row["here"] else ""
        lines.append(f"  {row['name']:<12} {row['kind']:<4} {row['engine']:<12} {mark:<5} {row['about']}")
    lines += ["imported tables"] if tables else ["no table was imported: derc targets import FILE keeps one"]
    for table in tables:
        if "damaged" in table:
            lines.append(f"  {table['name']}  damaged: {table['damaged']}")
        else:
            lines.append(
                f"  {table['name']}  {table['target']:<12} {table['engine']:<12} batch {table['batch']}  "
                f"{table['entries']} entries  {table['created']}  {table['device']}"
            )
    return {"targets": rows, "tables": tables, "folder": str(folder)}, "\n".join(lines)


def shown(shelf: Shelf, name: str, folder: Path | None = None) -> Shown:
    """A target with its figures and their sources and its tables, or one table with its entries."""
    folder = user_folder() if folder is None else folder
    if name.endswith(".json"):
        return _table("", read(Path(name)))
    if not name.endswith(".toml") and name not in found(folder):
        return _table(*shelf.find(name))
    target = Target.load(name, folder=folder)
    device = target.known
    tables = [_summary(shelf, one) for one in shelf.names()]
    tables = [table for table in tables if table.get("target") == target.name]
    plain = {"name": target.name, "engine": target.engine, "here": target.present, **asdict(device), "tables": tables}
    return plain, "\n".join(_target_lines(target, device, tables))


def imported(shelf: Shelf, file: Path, folder: Path | None = None) -> Shown:
    """Keep a table in the store, or a target file in the user's folder."""
    if file.suffix == ".toml":
        folder = user_folder() if folder is None else folder
        target = read_target(file)
        if target.name in found(folder):
            raise UsageError(f"there is a target {target.name} already: give the file and the name in it another name")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.name)
        except OSError as error:
            raise UsageError(f"the target cannot be kept in {folder}: {error.strerror}") from error
        return {"target": target.name, "file": str(folder / file.name)}, f"target {target.name} is kept in {folder}"
    name, table = shelf.add(file)
    plain = {"table": name, "target": table.target, "entries": len(table.entries)}
    return plain, f"table {name}: {len(table.entries)} entries for {table.target}, used with provenance recorded"


def exported(shelf: Shelf, name: str, file: Path, folder: Path | None = None) -> Shown:
    """Write a target's file where FILE ends in .toml, else a table."""
    if file.suffix == ".toml":
        targets = found(user_folder() if folder is None else folder)
        if name not in targets:
            raise UsageError(f"unknown target {name!r}, known: {', '.join(targets)}")
        try:
            replace_file(file, targets[name].read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"the target cannot be written to {file}: {error.strerror}") from error
        return {"target": name, "file": str(file)}, f"wrote {file}"
    table = shelf.export(name, file)
    return {"table": table, "file": str(file)}, f"wrote table {table} to {file}"


def _summary(shelf: Shelf, name: str) -> dict[str, Any]:
    try:
        table = read(shelf.path(name))
    except (IntegrityError, UsageError) as error:
        return {"name": name, "damaged": str(error)}
    return {
        "name": name,
        "target": table.target,
        "engine": table.spec,
        "batch": table.batch,
        "created": table.created,
        "device": _machine(table.machine),
        "entries": len(table.entries),
        "donors": sorted(table.donors),
        "noise": table.noise,
    }


def _machine(machine: Mapping[str, str]) -> str:
    return machine.get("gpu") or machine.get("cpu") or "of unknown device"


def _target_lines(target: Target, device: Device, tables: list[dict[str, Any]]) -> list[str]:
    core = " and core" if device.per_thread else ""
    peaks = ", ".join(f"{name} {value:g}" for name, value in device.peaks.items())
    size = f", {device.memory:g} GB" if device.memory else ""
    cache = f", L2 {device.l2:g} MB" if device.l2 else ""
    here = "this machine is one" if target.present else "this machine is none"
    return [
        f"{target.name}: {device.description} ({here})",
        f"engine      {target.engine}",
        f"peak        {peaks} dense tera-operations a second{core}, two for a multiply-accumulate",
        f"memory      {device.bandwidth:g} GB/s{size}{cache}",
        f"launch      {device.overhead:g} µs an operator",
        *(f"source      {name}: {source}" for name, source in device.sources.items()),
        *(f"table       {t['name']}  {t['entries']} entries  {t['created']}  {t['device']}" for t in tables),
    ]


def _table(name: str, table: TableFile) -> Shown:
    lines = [f"table {name or table.seal[:12]} of {table.target} with {table.spec}, batch {table.batch}"]
    lines += [f"measured    {table.created} by derc {table.derc}, A/A noise {table.noise:.2%}"]
    for title, facts in (("engine", table.engine), ("machine", table.machine), ("exporter", table.exporter)):
        lines.append(f"{title:<11} " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    lines += [f"donor       {donor}  {record.digest[:12]}" for donor, record in table.donors.items()]
    return table.model_dump(mode="json", by_alias=True), "\n".join([*lines, *map(_entry, table.entries)])


def _entry(entry: Entry) -> str:
    mark = "" if entry.stable else "  (unstable)"
    interval = f"[{entry.low_ms:.4f}, {entry.high_ms:.4f}]"
    return f"  {entry.kind:<7} {entry.name:<44} {entry.ms:9.4f} ms  {interval}  {entry.provenance}{mark}"
