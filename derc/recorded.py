"""Latencies of a device that is not here: recorded ones from imported tables, predicted ones for what they lack."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from derc.artifacts import BlockRef, CutDonor, Evaluated, Latency, LatencyTable, decode
from derc.errors import DercError, UsageError
from derc.roofline import Calibration, Sample, calibrate, computed, predictions
from derc.tables import DonorRecord, Entry, TableFile, entry_key, exporter_versions, span
from derc.target import Target
from derc.workload import Work

KINDS = ("donor", "block", "stitch")


@dataclass(frozen=True)
class Wanted:
    """What a compile needs latencies of: its donors' digests and cuts, its blocks by name, its stitches' keys."""

    digests: Mapping[str, str]
    cuts: Mapping[str, CutDonor]
    blocks: Mapping[str, BlockRef]
    stitches: tuple[str, ...] = ()
    batch: int = 1

    def entry_keys(self) -> dict[tuple[str, str], str]:
        """The key that a table's entry must have, by kind and name."""
        donors = {
            name: DonorRecord(digest=value, cuts=tuple(cut.name for cut in self.cuts[name].cuts))
            for name, value in self.digests.items()
        }
        names = [("donor", name) for name in donors] + [("block", name) for name in self.blocks]
        names += [("stitch", name) for name in self.stitches]
        exporter = exporter_versions()
        return {(kind, name): entry_key(kind, name, donors, self.batch, exporter) for kind, name in names}


@dataclass(frozen=True)
class Recorded:
    """What tables know of what is wanted, by kind and name; `missing` says of each of the others why it is not there.

    `noise` is the largest of the tables used.
    """

    latencies: Mapping[tuple[str, str], Latency]
    missing: Mapping[tuple[str, str], str]
    tables: tuple[TableFile, ...]

    @property
    def noise(self) -> float:
        return max((table.noise for table in self.tables), default=0.0)


@dataclass(frozen=True)
class Foreseen:
    """A complete latency table of recorded and predicted entries, and sentences on where they come from."""

    table: LatencyTable
    notes: tuple[str, ...]
    calibration: Calibration


def look_up(tables: Iterable[TableFile], target: Target, wanted: Wanted) -> Recorded:
    """What `tables` of the target, with its engine, batch size and threads, say; the newest wins.

    Raises UsageError where they hold a donor of this name with other weights, and none with these.
    """
    fitting = sorted((t for t in tables if _fits(t, target)), key=lambda table: table.created, reverse=True)
    check_weights(fitting, wanted.digests)
    known: dict[str, tuple[Entry, TableFile]] = {}
    for table in fitting:
        for entry in table.entries:
            known.setdefault(entry.key, (entry, table))
    latencies, missing, used = {}, {}, dict[str, TableFile]()
    for (kind, name), key in wanted.entry_keys().items():
        if key in known:
            entry, table = known[key]
            latencies[kind, name] = entry.latency("recorded" if entry.provenance == "measured" else "predicted")
            used[table.seal] = table
        else:
            missing[kind, name] = _why(kind, name, fitting)
    return Recorded(latencies, missing, tuple(used.values()))


def check_weights(tables: Sequence[TableFile], digests: Mapping[str, str]) -> None:
    """Raise UsageError where a donor is in `tables` with other weights than these alone."""
    for name, digest in digests.items():
        found = {table.donors[name].digest: table for table in tables if name in table.donors}
        if found and digest not in found:
            other, table = next(iter(found.items()))
            raise UsageError(
                f"the latency table {table.seal[:12]} of {table.target} measured another donor called {name}: its "
                f"weights or architecture are {other[:12]}, the zoo's {digest[:12]}; measure this zoo on the device, "
                f"or forget that table with derc targets remove {table.seal[:12]}"
            )


def foresee(target: Target, wanted: Wanted, works: Mapping[str, Work], tables: Sequence[TableFile]) -> Foreseen:
    """A latency table for a target that is not here: recorded where `tables` know it, else predicted.

    `works` are by the names of all that is wanted. The prediction is calibrated by the tables of the target, else of
    others of its kind. Raises UsageError as `look_up` does, DercError where the work of something is not given.
    """
    found = look_up(tables, target, wanted)
    more = _more(found, wanted)
    failed = {key for key in found.missing if key[1] in more["failed"]}
    found = replace(found, missing={key: why for key, why in found.missing.items() if key not in failed})
    lacking = [name for _, name in found.missing if name not in works]
    if lacking:
        raise DercError(f"the work of {', '.join(lacking)} is not known, so its latency cannot be predicted")
    calibration, stitching = calibrations(target, tables)
    own = computed(target.engine, "fp32")
    precisions = dict.fromkeys(works, own) | {name: computed(target.engine, span(name)[3]) for name in wanted.blocks}
    plain = {name: works[name] for kind, name in found.missing if kind != "stitch"}
    predicted = predictions(calibration, target, plain, precisions)
    joints = {name: works[name] for kind, name in found.missing if kind == "stitch"}
    predicted |= predictions(stitching, target, joints, precisions)
    every = {(kind, name): predicted[name] for kind, name in found.missing} | dict(found.latencies)
    order = [key for key in wanted.entry_keys() if key not in failed]
    parts = {kind: {name: every[k, name] for k, name in order if k == kind} for kind in KINDS}
    engine = found.tables[0].engine if found.tables else {"engine": target.engine.partition(":")[0]}
    table = LatencyTable(
        target.name, dict(engine), parts["donor"], parts["block"], parts["stitch"], found.noise, **more
    )
    return Foreseen(table, _notes(found, calibration), calibration)


def calibrations(target: Target, tables: Sequence[TableFile]) -> tuple[Calibration, Calibration]:
    """That of donors and blocks, and that of stitches, which is the same where none was measured."""
    plain = calibrate(target, samples(tables))
    measured = samples(tables, stitches=True)
    return plain, calibrate(target, measured) if measured else plain


def samples(tables: Iterable[TableFile], *, stitches: bool = False) -> list[Sample]:
    """What the tables measured of donors and blocks, or of stitches, each of which counts as a network."""
    found = []
    for table in tables:
        for entry in table.entries:
            if entry.work is None or entry.provenance != "measured" or (entry.kind == "stitch") != stitches:
                continue
            network, precision, threads = entry.key, "fp32", max(table.threads, 1)
            if not stitches:
                donor, _, _, precision = span(entry.name) if entry.kind == "block" else (entry.name, 0, 0, "fp32")
                network = table.donors[donor].digest
            found.append(
                Sample(network, entry.work.work(), entry.ms, table.device, table.target, table.spec, threads, precision)
            )
    return found


def _fits(table: TableFile, target: Target) -> bool:
    threads = target.threads in (0, table.threads) or table.threads == 0
    return (table.target, table.spec, table.batch) == (target.name, target.engine, target.batch) and threads


def _why(kind: str, name: str, tables: Sequence[TableFile]) -> str:
    """Why no table has an entry."""
    if not tables:
        return "no table of this target, engine, batch size and threads was imported"
    if kind == "stitch":
        return "its shape was not measured"
    donor = span(name)[0] if kind == "block" else name
    holding = [table for table in tables if donor in table.donors]
    if not holding:
        return f"no table has the donor {donor}"
    exporter, theirs = exporter_versions(), holding[0].exporter
    if all(table.exporter != exporter for table in holding):
        changed = [f"{k} {theirs.get(k)} there, {v} here" for k, v in exporter.items() if theirs.get(k) != v]
        return f"exported by other versions ({', '.join(changed)})"
    measured = [entry.name for entry in holding[0].entries if entry.kind == "block" and span(entry.name)[0] == donor]
    return f"of {donor} the table has {', '.join(measured) or 'no block'}"


def _more(found: Recorded, wanted: Wanted) -> dict[str, Any]:
    """The other fields of a LatencyTable, as far as the tables used know them of what is wanted."""
    more: dict[str, Any] = {"networks": (), "errors": {}, "failed": {}, "distortion": {}, "weights": {}}
    for table in reversed(found.tables):
        networks = _networks(table.more.get("networks", []), found, wanted)
        names = {str(network.assembly) for network in networks}
        more["networks"] += networks
        more["errors"] |= {name: value for name, value in table.more.get("errors", {}).items() if name in names}
        for field in ("failed", "distortion", "weights"):
            more[field] |= {k: v for k, v in table.more.get(field, {}).items() if _ours(k, table, wanted)}
    return more


def _ours(name: str, table: TableFile, wanted: Wanted) -> bool:
    """Whether a name in a table's other fields is that of something wanted, of the same donor."""
    if name in wanted.stitches:
        return True
    donor = name if name in wanted.digests else span(name)[0] if name in wanted.blocks else ""
    return donor in table.donors and table.donors[donor].digest == wanted.digests[donor]


def _networks(value: Any, found: Recorded, wanted: Wanted) -> tuple[Evaluated, ...]:
    """Networks measured whole whose blocks are all wanted and recorded, with the blocks of this partition."""
    kept = []
    for one in decode(tuple[Evaluated, ...], json.dumps(value), {}):
        names = [str(block) for block in one.assembly.blocks]
        if one.latency is not None and all(("block", name) in found.latencies for name in names):
            assembly = replace(one.assembly, blocks=tuple(wanted.blocks[name] for name in names))
            kept.append(replace(one, assembly=assembly, latency=replace(one.latency, provenance="recorded")))
    return tuple(kept)


def _notes(found: Recorded, calibration: Calibration) -> tuple[str, ...]:
    """Where the entries come from, and what is missing."""
    notes = [
        f"recorded on {table.machine.get('gpu') or table.machine.get('cpu', 'an unnamed machine')} at {table.created} "
        f"(table {table.seal[:12]})"
        for table in found.tables
    ]
    if found.missing:
        total = len(found.missing) + len(found.latencies)
        notes.append(
            f"{len(found.missing)} of {total} latencies are predicted by {calibration.basis}; 95% of known errors lie "
            f"between {calibration.low:.2f} and {calibration.high:.2f} times the prediction"
        )
        reasons: dict[str, list[str]] = {}
        for (_, name), why in found.missing.items():
            reasons.setdefault(why, []).append(name)
        notes += [f"not recorded: {_some(names)}: {why}" for why, names in reasons.items()]
    return tuple(notes)


def _some(names: Sequence[str], most: int = 4) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
