"""What the commands that only look print: a JSON value and a text for each."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from derc.artifacts import Latency, LatencyTable, Partition, digest, encode
from derc.config import CompileSettings
from derc.console import Console
from derc.donor import Donor
from derc.errors import UsageError
from derc.factories import LIBRARIES, architecture, source_bytes
from derc.lowered import Lowered
from derc.pipeline import Timings, code_version
from derc.store import Store
from derc.text import type_text

Shown = tuple[dict[str, Any], str]
WEIGHTS = "published weights are not loaded: costs do not depend on them"


def show_zoo(settings: CompileSettings, console: Console) -> Shown:
    """Donors with their cuts and units; published weights are not loaded, those in files are checked."""
    from derc.workspace import check_once, load_zoo

    zoo = load_zoo(settings, console)
    store = Store.default(say=console.say, on_damage=console.say)
    donors: dict[str, Any] = {}
    lines: list[str] = []
    for donor in console.track(zoo.donors, "lower", len(zoo.donors)):
        if not donor.pretrained:
            check_once(store, donor, console)
        donors[donor.name] = _donor(donor, store)
        lines += ["", *_donor_lines(donor.name, donors[donor.name])]
    return {"weights": WEIGHTS, "donors": donors, "left_out": dict(zoo.left_out)}, "\n".join([_head(donors), *lines])


def _structure(donor: Donor, store: Store) -> dict[str, Any]:
    """The donor's costs, cuts and units without its weights, found once for all donors of one architecture."""
    from derc.passes import cut, lower
    from derc.workspace import NEGLIGIBLE

    library, _, name = donor.factory.partition(":")
    network = architecture(name) if library in LIBRARIES else f"{donor.folder} {name}"
    normal = any(donor.mean) or any(value != 1 for value in donor.std)
    key = digest(
        ["structure", code_version(lower.__name__), code_version(cut.__name__), source_bytes(donor.factory).hex()],
        [library, network, list(donor.input_size), normal, len(donor.labels or ()), NEGLIGIBLE],
        dict(donor.kwargs),
    )
    found = store.get_bytes(key)
    if found is None:
        module = replace(donor, weights=None, pretrained=False).build()
        lowered = lower.lower(module, donor.input_size, name=donor.name, mean=donor.mean, std=donor.std)
        found = json.dumps(_plain(lowered.with_cuts(cut.find_cuts(lowered.graph, NEGLIGIBLE)))).encode()
        store.put_bytes(key, found, note=f"structure of {name}")
    plain: dict[str, Any] = json.loads(found)
    return plain


def _plain(lowered: Lowered) -> dict[str, Any]:
    """Costs, cuts and units; a cut's path is the outermost submodule that gives it, or where in which one it lies."""
    paths = {cut.name: cut.name for cut in lowered.cuts}
    for call in sorted(lowered.calls, key=lambda call: -len(call.members)):
        paths |= {name: f"{call.path}: {name}" for name in call.members & paths.keys()}
    paths |= {op.name: op.target for op in lowered.graph.ops if op.kind == "call_module"}
    paths |= {call.result: call.path for call in reversed(lowered.calls)}
    return {
        "params": lowered.graph.params,
        "macs": lowered.graph.macs,
        "cuts": [{"value": cut.name, "path": paths[cut.name], "type": type_text(cut.type)} for cut in lowered.cuts],
        "units": [asdict(unit) for unit in lowered.units],
        "remarks": [
            *(f"no cut between {tie.ops[0]} and {tie.ops[-1]}: they share {tie.weight}" for tie in lowered.graph.ties),
            *(f"{name}: {text}" for name, text in lowered.graph.notes.items()),
        ],
    }


def _donor(donor: Donor, store: Store) -> dict[str, Any]:
    return {
        "factory": donor.factory,
        "kwargs": dict(donor.kwargs),
        "input_size": list(donor.input_size),
        "weights": "published, not loaded" if donor.pretrained else "file" if donor.weights else "none",
        "source": donor.source,
        "licence": donor.licence,
        **_structure(donor, store),
    }


def _head(donors: dict[str, Any]) -> str:
    """How many donors of which size, and what is to be downloaded for a compile."""
    params = [donor["params"] for donor in donors.values() if donor["weights"].startswith("published")]
    total = sum(donor["params"] for donor in donors.values())
    head = f"{len(donors)} donors, {total / 1e6:.1f} M parameters"
    if not params:
        return head
    size = f"{4 * sum(params) / 1e9:.2f} GB"
    return (
        f"{head}\nweights: not loaded for {len(params)} donors, costs do not depend on them; about {size} to download"
    )


def _donor_lines(name: str, donor: dict[str, Any]) -> list[str]:
    size = "x".join(map(str, donor["input_size"]))
    lines = [
        f"{name}  {donor['factory']}  {size}  {donor['params'] / 1e6:.2f} M params  {donor['macs'] / 1e9:.3f} G MACs  "
        f"{len(donor['units'])} units  licence {donor['licence']}"
    ]
    for index, cut in enumerate(donor["cuts"]):
        unit = donor["units"][index - 1] if index else None
        costs = f"{unit['params'] / 1e6:8.3f} M {unit['macs'] / 1e9:8.4f} G" if unit else " " * 21
        lines.append(f"  {index:>3}  {costs}  {cut['type']:<44}  {cut['path']}")
    return lines + [f"       {remark}" for remark in donor["remarks"]]


def show_partition(settings: CompileSettings, console: Console) -> Shown:
    """Equivalence sets."""
    from derc.compiler import analyse
    from derc.workspace import open_context

    context = open_context(settings, console)
    found = analyse(context, settings, Timings()).partition
    blocks = {name: [asdict(b) for b in donor] for name, donor in found.blocks.items()}
    names = ("objective", "bound", "gap", "epsilon", "centres", "moved", "distinct")
    shown = {name: getattr(found, name) for name in names}
    ties = [asdict(tie) for tie in found.near_ties]
    return {**shown, "near_ties": ties, "blocks": blocks}, "\n".join(_partition_lines(found))


def _partition_lines(found: Partition) -> list[str]:
    """The objective with what is known of its bound, the sets, and how sure the cuts are."""
    proof = "" if found.gap is None else f", at most {found.bound:.4f} (gap {found.gap:.2%})"
    lines = [f"summed similarity {found.objective:.4f}{proof}"]
    if found.distinct:
        shares = ", ".join(f"{blocks}: {share:.0%}" for blocks, share in found.distinct.items())
        lines.append(f"blocks that belong in their set, in the worst set, by number of blocks: {shares}")
    every = [block for chain in found.blocks.values() for block in chain]
    for number in range(1 + max(block.set for block in every)):
        centre = f" (centre {found.centres[number]})" if found.centres else ""
        members = "  ".join(str(block) for block in every if block.set == number)
        lines.append(f"equivalence set {number}{centre}: {members}")
    if found.moved is not None:
        lines.append(f"{found.moved:.0%} of the cuts lie elsewhere by one half of the probe images alone")
    lines += [
        f"near-tie: {tie.donor} could end set {tie.set} at cut {tie.other} in place of {tie.cut} (loses {tie.loss:.5%})"
        for tie in found.near_ties
    ]
    return lines


def show_profile(settings: CompileSettings, console: Console, output: Path | None) -> Shown:
    """The latency table; written to `output`, to be imported elsewhere, with the raw samples beside it where given."""
    from derc.compiler import analyse, tell_left_out
    from derc.compiler import profile as measure
    from derc.tables import write
    from derc.workspace import open_context

    if output is not None:
        check_writable(output)
    context = open_context(settings, console)
    timings = Timings()
    analysis = analyse(context, settings, timings)
    table = measure(context, analysis, settings, timings)
    tell_left_out(context, table)
    if output is not None:
        from derc.tabling import table_file

        file = table_file(context, analysis.cuts, analysis.partition, table, settings.profile_s)
        write(file, output, table.samples)
    shown = {f.name: getattr(table, f.name) for f in fields(table) if f.name != "samples"}
    plain = {name: json.loads(encode(value)[0]) for name, value in shown.items()}
    return plain, _table_text(table)


def check_writable(output: Path) -> None:
    """Raise UsageError, before anything is measured, where no file can be written at `output`."""
    parent = output.absolute().parent
    if output.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(
            f"the latency table cannot be written to {output}: name a file in a folder that can be written"
        )


def _table_text(table: LatencyTable) -> str:
    lines = [f"{name}: {value}" for name, value in table.engine.items()]
    lines.append(f"A/A noise {table.noise:.2%}")
    for title, rows in (("donors", table.donors), ("blocks", table.blocks), ("stitches", table.stitches)):
        lines.append(title)
        lines.extend(f"  {name:<44} {_latency_text(latency)}" for name, latency in rows.items())
    return "\n".join(lines)


def _latency_text(latency: Latency) -> str:
    mark = "" if latency.stable else "  (unstable)"
    return f"{latency.ms:8.4f} ms  [{latency.low_ms:.4f}, {latency.high_ms:.4f}]  {latency.provenance}{mark}"


def list_store(store: Store) -> Shown:
    """Entries, newest last."""
    entries = sorted(store.entries(), key=lambda entry: entry.created)
    rows: list[dict[str, Any]] = [
        {"key": e.key, "kind": e.kind, "note": e.note, "bytes": e.size, "created": str(e.created)} for e in entries
    ]
    lines = [f"{store.root}: {len(rows)} entries, {sum(e.size for e in entries) / 1e6:.1f} MB"]
    lines += [f"  {row['key'][:12]}  {row['note']:<10} {row['kind']:<18} {row['bytes']:>10} B" for row in rows]
    return {"root": str(store.root), "entries": rows}, "\n".join(lines)
