"""How long the certified best selections take as the candidates for each position grow, beside HiGHS and Gurobi.

Instances are random: four positions, three resources of which two have a lower and an upper limit, stitches whose cost
follows from the types that they join, and unlikeness of features. Larger candidates are better, and take more. What the
search gives is held against enumeration of all paths at 24 candidates, and against the integer programs' best where
they finish. Seeds are none that the search was written with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from derc.artifacts import Array
from derc.dag import Limits
from derc.errors import MissingDependencyError
from derc.milp import IntegerProgram, Solver
from derc.narrowing import Cheapest, cheapest_wide
from derc.registry import SOLVERS, load
from derc.wide import Pairs, Wide

SIZES = (24, 100, 1_000, 10_000)
TOPS = (1, 50, 500)
SEEDS = (1001, 1002, 1003)
POSITIONS, TYPES, FEATURES = 4, 20, 16
PROGRAMS = {24: 60.0, 100: 120.0}
"""Seconds that an integer programming solver gets, by candidates for each position; none beyond."""
QUICK_PROGRAMS = {24: 5.0}


def selection_rows(quick: bool) -> list[dict[str, Any]]:
    """One row for each size, seed and number of solutions: seconds, certificate, and agreement with the others."""
    rows = []
    for size in SIZES:
        for seed in SEEDS[:1] if quick else SEEDS:
            wide, limits = instance(seed, size)
            others = programs(wide, limits, (QUICK_PROGRAMS if quick else PROGRAMS).get(size))
            truth = enumerated(wide, limits) if size == SIZES[0] else None
            for top in TOPS:
                rows.append(_row(wide, limits, size, seed, top, truth) | (others if top == 1 else {}))
                if top == 1:
                    rows[-1] |= _agreement(rows[-1])
    return rows


def _row(wide: Wide, limits: Limits, size: int, seed: int, top: int, truth: Array | None) -> dict[str, Any]:
    begun = time.perf_counter()
    found = cheapest_wide(wide, limits, top)
    seconds = time.perf_counter() - begun
    row = {"what": "selection", "blocks": size, "top": top, "seed": seed, "seconds": seconds}
    row |= {"certified": found.certified, "found": len(found.costs), "best": _end(found, 0), "last": _end(found, -1)}
    if truth is not None:
        same = len(found.costs) == min(top, len(truth))
        row["enumeration_difference"] = float(np.abs(found.costs - truth[:top]).max()) if same else None
    return row


def _end(found: Cheapest, place: int) -> float | None:
    return float(found.costs[place]) if len(found.costs) else None


def _agreement(row: dict[str, Any]) -> dict[str, Any]:
    """By how much the proved optima of the integer programs differ from the search's best."""
    return {
        f"{name}_difference": abs(row[name]["objective"] - row["best"])
        for name in ("highs", "gurobi")
        if row.get(name, {}).get("status") == "optimal" and row["best"] is not None
    }


def instance(seed: int, size: int) -> tuple[Wide, Limits]:
    """A random problem with `size` candidates for each position."""
    random = np.random.default_rng(seed)
    cost, amounts, pairs = [], [], []
    for _ in range(POSITIONS):
        scale = random.lognormal(0.0, 0.6, size)
        amounts.append(scale * random.lognormal(0.0, 0.35, (3, size)))
        cost.append(0.4 - 0.12 * np.log(scale) + random.normal(0.0, 0.06, size))
    for _ in range(POSITIONS - 1):
        ends = random.normal(size=(2, size, FEATURES)) + 1.0
        ends /= np.linalg.norm(ends, axis=2, keepdims=True)
        kinds = random.integers(0, TYPES, (2, size))
        table = np.concatenate([random.uniform(0, 0.1, (1, TYPES, TYPES)), random.uniform(0, 0.25, (3, TYPES, TYPES))])
        pairs.append(Pairs((-ends[0]).astype(np.float32), ends[1].astype(np.float32), *kinds, table))
    middle = np.sum([np.median(part, axis=1) for part in amounts], axis=0)
    limits = Limits(middle * np.array([0.8, 0.6, -np.inf]), middle * np.array([1.0, 0.95, 1.1]))
    return Wide(tuple(cost), tuple(amounts), tuple(pairs)), limits


def enumerated(wide: Wide, limits: Limits) -> Array:
    """Costs of all paths within the limits, cheapest first, by adding up everything."""
    sizes = [len(cost) for cost in wide.cost]
    grid = np.indices(sizes).reshape(len(sizes), -1)
    cost = sum(part[places] for part, places in zip(wide.cost, grid, strict=True))
    amounts = sum(part[:, places] for part, places in zip(wide.amounts, grid, strict=True))
    for k, pairs in enumerate(wide.pairs):
        typed = pairs.table[:, pairs.gives[grid[k]], pairs.takes[grid[k + 1]]]
        alike = pairs.left.astype(np.float64) @ pairs.right.astype(np.float64).T
        cost, amounts = cost + typed[0] + alike[grid[k], grid[k + 1]], amounts + typed[1:]
    fits = ((amounts >= limits.low[:, None]) & (amounts <= limits.high[:, None])).all(axis=0)
    return np.sort(cost[fits])


def programs(wide: Wide, limits: Limits, seconds: float | None) -> dict[str, Any]:
    """What HiGHS and Gurobi make of the best path alone within so many seconds each."""
    if seconds is None:
        return {}
    program = program_of(wide, limits)
    return {name: _solved(load(SOLVERS, name), program, seconds) for name in ("highs", "gurobi")}


def _solved(kind: type[Solver], program: IntegerProgram, seconds: float) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        answer = kind().solve(program, time_limit_s=seconds)
    except MissingDependencyError as error:
        return {"status": "not run", "why": str(error)}
    known = {"objective": answer.objective, "bound": answer.bound} if answer.x is not None else {}
    return {"status": answer.status, "seconds": time.perf_counter() - begun, **known}


def program_of(wide: Wide, limits: Limits) -> IntegerProgram:
    """The flow program: a variable for each edge, a row for each candidate, for the source and for each limit."""
    dag, _ = wide.dag(wide.every)
    edges, inner = len(dag.tail), dag.nodes - 1
    out, into = dag.tail, dag.head
    row = np.concatenate([out, into[into < inner], np.repeat(inner + np.arange(len(dag.amounts)), edges)])
    column = np.concatenate(
        [np.arange(edges), np.flatnonzero(into < inner), np.tile(np.arange(edges), len(dag.amounts))]
    )
    scale = np.where(np.isfinite(limits.upper), limits.upper, 1.0)
    data = np.concatenate([np.ones(edges), -np.ones(int((into < inner).sum())), (dag.amounts / scale[:, None]).ravel()])
    order = np.lexsort((column, row))
    rows = inner + len(dag.amounts)
    flow = np.eye(1, inner)[0]
    return IntegerProgram(
        cost=dag.cost,
        indptr=np.searchsorted(row[order], np.arange(rows + 1)).astype(np.int32),
        indices=column[order].astype(np.int32),
        data=data[order],
        row_lower=np.concatenate([flow, limits.low / scale]),
        row_upper=np.concatenate([flow, limits.high / scale]),
        lower=np.zeros(edges),
        upper=np.ones(edges),
        integer=np.ones(edges, bool),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: medians over seeds."""
    lines = [f"{'blocks':>7} {'top':>4} {'seconds':>9} {'certified':>9}  others, top 1"]
    for size in SIZES:
        for top in TOPS:
            some = [row for row in rows if (row["blocks"], row["top"]) == (size, top)]
            others = [f"{name} {_told(some, name)}" for name in ("highs", "gurobi") if any(name in row for row in some)]
            seconds = float(np.median([row["seconds"] for row in some]))
            certified = f"{sum(row['certified'] for row in some)}/{len(some)}"
            lines.append(f"{size:>7} {top:>4} {seconds:>9.2f} {certified:>9}  {'; '.join(others)}")
    return "\n".join(lines)


def _told(rows: list[dict[str, Any]], name: str) -> str:
    said = [row[name] for row in rows if name in row]
    times = [one["seconds"] for one in said if "seconds" in one]
    status = ", ".join(sorted({one["status"] for one in said}))
    return f"{status} in {float(np.median(times)):.1f} s" if times else status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = selection_rows(arguments.quick)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
