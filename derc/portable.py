"""From the profile's latency table to the file that is carried elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import ceil
from typing import Any

from derc.artifacts import CutDonor, Latency, LatencyTable, encode
from derc.bundle import seal
from derc.measure import PERCENTILES
from derc.tables import KIND, SCHEMA, DonorRecord, TableFile, Text, entry_key, exporter_versions, parse
from derc.target import Target
from derc.version import VERSION
from derc.workload import Work

OWN = ("target", "engine", "donors", "blocks", "stitches", "noise", "samples")
"""Fields of a LatencyTable that have a place of their own in the file; the others are kept as they are."""


def describe(
    table: LatencyTable,
    target: Target,
    *,
    digests: Mapping[str, str],
    cuts: Mapping[str, CutDonor],
    works: Mapping[str, Work],
    machine: Text,
    options: Mapping[str, float],
    created: str,
) -> TableFile:
    """`table` as a file; `digests` and `cuts` are by donor, `works` by the names of donors, blocks and stitches.

    `created` is a time in ISO 8601. Predicted stitches stay predicted.
    """
    donors = {name: {"digest": digests[name], "cuts": [cut.name for cut in cuts[name].cuts]} for name in digests}
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": KIND,
        "derc": VERSION,
        "created": created,
        "target": target.name,
        "device": json.loads(encode(target.device)[0]),
        "spec": target.engine,
        "threads": int(table.engine.get("threads", "0")),
        "batch": target.batch,
        "engine": table.engine,
        "machine": dict(machine),
        "exporter": exporter_versions(),
        "options": dict(options),
        "noise": table.noise,
        "donors": donors,
        "more": {f.name: json.loads(encode(getattr(table, f.name))[0]) for f in fields(table) if f.name not in OWN},
    }
    records = {name: DonorRecord.model_validate(record) for name, record in donors.items()}
    exporter = body["exporter"]
    parts = (("donor", table.donors), ("block", table.blocks), ("stitch", table.stitches))
    body["entries"] = [
        _entry(
            kind,
            name,
            entry_key(kind, name, records, target.batch, exporter),
            latency,
            table.samples.get(f"{kind} {name}"),
            works.get(name),
        )
        for kind, latencies in parts
        for name, latency in latencies.items()
    ]
    draft = TableFile.model_validate_json(json.dumps({**body, "seal": ""}))
    return parse(json.dumps(seal(draft.model_dump(mode="json", by_alias=True))), "the table")


def _entry(kind: str, name: str, key: str, latency: Latency, seconds: Any, work: Work | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "key": key,
        "ms": latency.ms,
        "low_ms": latency.low_ms,
        "high_ms": latency.high_ms,
        "provenance": latency.provenance,
        "samples": latency.samples,
        "stable": latency.stable,
        "percentiles_ms": percentiles([] if seconds is None else [float(value) for value in seconds]),
        "work": None if work is None else json.loads(encode(work)[0]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in ms, each only where there are samples enough to state it."""
    ordered = sorted(seconds)
    return {
        f"p{p}": 1e3 * ordered[ceil(p / 100 * len(ordered)) - 1] for p, n in PERCENTILES.items() if len(ordered) >= n
    }
