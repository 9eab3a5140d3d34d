"""What the commands that only look print: a JSON value and a text for each."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from derc.artifacts import CutDonor, Latency, LatencyTable
from derc.config import CompileSettings
from derc.console import Console
from derc.errors import UsageError
from derc.pipeline import Timings
from derc.store import Store
from derc.text import type_text

Shown = tuple[dict[str, Any], str]


def show_zoo(settings: CompileSettings, console: Console) -> Shown:
    """Donors with their cuts and units."""
    from derc.workspace import NEGLIGIBLE, LiveDonors, open_zoo

    zoo = open_zoo(settings, Store.default(say=console.say, on_damage=console.say), console)
    live = LiveDonors(zoo, NEGLIGIBLE)
    donors: dict[str, Any] = {}
    lines: list[str] = []
    for donor in console.track(zoo.donors, "lower", len(zoo.donors)):
        lowered = live[donor.name]
        cut = CutDonor(lowered.cuts, lowered.units)
        graph = lowered.graph
        donors[donor.name] = {
            "factory": donor.factory,
            "licence": donor.licence,
            "params": graph.params,
            "macs": graph.macs,
            "cuts": [{"value": v.name, "type": type_text(v.type)} for v in cut.cuts],
            "units": [asdict(unit) for unit in cut.units],
        }
        lines.append(
            f"{donor.name}  {donor.factory}  {graph.params / 1e6:.3f} M params, {graph.macs / 1e9:.4f} G MACs, "
            f"{len(cut.units)} units, licence {donor.licence}"
        )
        for index, value in enumerate(cut.cuts):
            unit = cut.units[index - 1] if index else None
            costs = f"  {unit.params:>9} params {unit.macs:>12} MACs" if unit else ""
            lines.append(f"  {index:>3}  {type_text(value.type):<44} {value.name}{costs}")
    return {"donors": donors}, "\n".join(lines)


def show_partition(settings: CompileSettings, console: Console) -> Shown:
    """Equivalence sets."""
    from derc.compiler import analyse
    from derc.workspace import open_context

    context = open_context(settings, console)
    found = analyse(context, settings, Timings()).partition
    sets = range(len(next(iter(found.blocks.values()))))
    lines = [f"summed similarity {found.objective:.4f}"]
    for number in sets:
        lines.append(f"equivalence set {number}: " + "  ".join(str(blocks[number]) for blocks in found.blocks.values()))
    blocks = {name: [asdict(b) for b in donor] for name, donor in found.blocks.items()}
    return {"objective": found.objective, "epsilon": found.epsilon, "blocks": blocks}, "\n".join(lines)


def show_profile(settings: CompileSettings, console: Console, output: Path | None) -> Shown:
    """The latency table; written to `output` as JSON where given."""
    from derc.compiler import analyse
    from derc.compiler import profile as measure
    from derc.workspace import open_context

    context = open_context(settings, console)
    timings = Timings()
    table = measure(context, analyse(context, settings, timings), settings, timings)
    plain = asdict(table)
    if output is not None:
        try:
            output.write_text(json.dumps(plain, indent=1), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the latency table cannot be written to {output}: {error.strerror}") from error
    return plain, _table_text(table)


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
