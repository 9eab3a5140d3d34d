"""`derc pareto`: the sweep of a zoo's latency budgets as a table, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from derc import sweep
from derc.artifacts import Assembly
from derc.bundle import check_place
from derc.compiler import open_search, prepare
from derc.config import KEYS, CompileSettings
from derc.console import Console
from derc.errors import UsageError
from derc.manifest import matching
from derc.measure import LEAST_LIMIT_S
from derc.passes.select import spans
from derc.refining import refine_these
from derc.report.front import draw
from derc.search import Judged
from derc.summary import command_line
from derc.sweep import Networks, admitted, hypervolume
from derc.tables import replace_file
from derc.version import VERSION

SCHEMA = 1
FILES = ("pareto.json", "pareto.txt", "pareto.svg")
OPTIONS = tuple(name for name in KEYS if name not in ("latency_ms", "emit"))
"""Settings that a sweep has a use for."""
PER_POINT = 8
"""Evaluations for each point, where their number was not given."""


def write_front(settings: CompileSettings, points: int, output: Path, console: Console) -> tuple[dict[str, Any], str]:
    """Sweep, write the three FILES into `output` and return the JSON and the table.

    Raises UsageError where they cannot be written, before anything is measured, and for a single latency budget.
    """
    if settings.latency_ms is not None:
        raise UsageError("derc pareto sweeps the latency budget itself: leave --latency-ms out, or use derc compile")
    total = PER_POINT * points if "evaluations" in settings.defaulted else settings.evaluations
    sweep.check(points, total)
    _check(output)
    prepared = prepare(settings, console)
    improve = partial(refine_these, amount=settings.match_amount, teacher=settings.match_teacher)
    found = []
    for number in range(len(prepared.contexts)):
        search = open_search(prepared, settings, prepared.timings, number)
        found.append(sweep.sweep(search, points, total, (settings.profile_s or LEAST_LIMIT_S) / 2, improve))
    told = describe(found, settings)
    text = table(told)
    contents = (json.dumps(told, indent=1) + "\n", text + "\n", draw(told))
    output.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        replace_file(output / name, content)
    return told, text


def describe(found: Sequence[Networks], settings: CompileSettings) -> dict[str, Any]:
    """The front over all engines, all that was evaluated, and what assemblies add to the intact donors."""
    rows = sorted(
        (_row(one, a) for one in found for a in admitted(one.search)), key=lambda row: (row["ms"], -row["score"])
    )
    best = -1.0
    for row in rows:
        row["front"], best = row["score"] > best, max(best, row["score"])
    ends = [one.latency(a).ms for one in found for a in one.search.judged if a.intact]
    donors = [(row["ms"], row["score"]) for row in rows if row["intact"]]
    known = [row for row in rows if row["provenance"] == "measured"] or rows
    labelled = any(j.scores.labelled for j in found[0].search.judged.values())
    return {
        "schema": SCHEMA,
        "derc": VERSION,
        "command": command_line(settings, "pareto", "--points", str(len(found[0].budgets)), names=OPTIONS),
        "target": found[0].search.context.target.name,
        "engines": [one.search.context.engine.describe() for one in found],
        "score": "validation accuracy" if labelled else "agreement with the task donors",
        "budgets_ms": list(found[0].budgets),
        "evaluations": sum(one.search.spent for one in found),
        "hypervolume": {
            "intact": hypervolume(donors, max(ends), min(ends)),
            "all": hypervolume([(row["ms"], row["score"]) for row in known], max(ends), min(ends)),
        },
        "networks": rows,
    }


def _row(one: Networks, assembly: Assembly) -> dict[str, Any]:
    judged, latency = one.search.judged[assembly], one.latency(assembly)
    return {
        "assembly": str(assembly),
        "spans": spans(assembly),
        "intact": assembly.intact,
        "engine": one.search.context.target.engine,
        "ms": latency.ms,
        "ci95_ms": [latency.low_ms, latency.high_ms],
        "provenance": latency.provenance,
        "stable": latency.stable,
        "score": judged.scores.value,
        "matching": _matching(judged),
        **{name: judged.predicted[name] for name in ("params", "macs", "memory_mb")},
    }


def _matching(one: Judged) -> dict[str, Any] | None:
    """As a manifest has it, and `score_before`; None for a network that was not matched."""
    told = matching(one)
    return told and {**told, "score_before": (one.unmatched or one.scores).value}


def table(told: dict[str, Any]) -> str:
    """The front, fastest first, and what assemblies add to it."""
    lines = [f"{'latency ms':>10}  {'interval':<17}  {'':<9}  {told['score'].split()[0]:>10}  {'M params':>8}  network"]
    for row in told["networks"]:
        if row["front"]:
            low, high = row["ci95_ms"]
            lines.append(
                f"{row['ms']:>10.4f}  {f'{low:.4f} – {high:.4f}':<17}  {row['provenance']:<9}  {row['score']:>10.1%}  "
                f"{row['params'] / 1e6:>8.3f}  {row['spans']}{_remark(row)}"
            )
    volume = told["hypervolume"]
    lines.append("")
    lines.append(
        f"mean {told['score']} over log latency between the fastest and the slowest donor: {volume['all']:.1%} with "
        f"assemblies, {volume['intact']:.1%} with intact donors alone"
    )
    return "\n".join(lines)


def _remark(row: dict[str, Any]) -> str:
    """What the table says behind a network's name."""
    told = row["matching"]
    matched = f"  (matched, {told['score_before']:.1%} before)" if told and told["kept"] else ""
    return "  (intact)" if row["intact"] else matched


def _check(output: Path) -> None:
    """Raise UsageError unless the FILES can be written into `output` and none is there."""
    there = [name for name in FILES if (output / name).exists()]
    if there:
        raise UsageError(f"{output / there[0]} exists already: name another folder with -o, or remove it")
    check_place(output.absolute(), f"the front in {output}")
