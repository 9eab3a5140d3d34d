"""gurobi: the Gurobi Optimizer, used where a licence is found or where it is asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from derc.artifacts import Array
from derc.errors import DercError, MissingDependencyError
from derc.milp import IntegerProgram, SizeLimitError, Solution, solution

LICENCE_FOLDERS = (Path("/opt/gurobi"), Path("/Library/gurobi"))
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Gurobi:
    """Solves on one thread with a fixed seed, printing nothing.

    Raises MissingDependencyError where gurobipy is not installed.
    """

    seed: int = 0
    name: ClassVar[str] = "gurobi"

    def __post_init__(self) -> None:
        if not _installed():
            raise MissingDependencyError('gurobi needs the package gurobipy: pip install "derc[gurobi]"')

    @classmethod
    def available(cls) -> bool:
        """Whether the package and a licence file are there; the package's own size-limited licence does not count."""
        return _installed() and any(path.is_file() for path in _licences())

    def solve(
        self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6, start: Array | None = None
    ) -> Solution:
        """Minimise to the relative `gap`; `time_limit_s` is wall-clock, `start` a point to begin from.

        Raises MissingDependencyError where no licence is valid, SizeLimitError where the program exceeds the licence's
        size, DercError for an unbounded program.
        """
        import gurobipy

        with _licensed(gurobipy, program), gurobipy.Env(empty=True) as environment:
            environment.setParam("OutputFlag", 0)
            environment.start()
            with gurobipy.Model(env=environment) as model:
                _options(model, self.seed, time_limit_s, gap)
                _fill(gurobipy, model, program)
                if start is not None:
                    model.update()
                    model.setAttr("Start", model.getVars(), start.tolist())
                model.optimize()
                return _answer(gurobipy, model, program)


def _installed() -> bool:
    return importlib.util.find_spec("gurobipy") is not None


def _licences() -> Iterator[Path]:
    """Where Gurobi itself looks for a licence file."""
    named = os.environ.get("GRB_LICENSE_FILE", "")
    yield from (Path(part) for part in named.split(os.pathsep) if part)
    yield Path.home() / "gurobi.lic"
    for folder in LICENCE_FOLDERS:
        yield from sorted(folder.parent.glob(f"{folder.name}*/gurobi.lic"))


@contextmanager
def _licensed(gurobipy: Any, program: IntegerProgram) -> Iterator[None]:
    """Turn Gurobi's licence errors into ours."""
    try:
        yield
    except gurobipy.GurobiError as error:
        if error.errno == gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED:
            raise SizeLimitError(
                f"this program ({len(program.cost)} variables, {len(program.row_lower)} rows) is larger than Gurobi's "
                f"size-limited licence allows: point GRB_LICENSE_FILE at a full licence, or use --solver highs"
            ) from error
        if error.errno == gurobipy.GRB.Error.NO_LICENSE:
            raise MissingDependencyError(f"Gurobi has no valid licence ({error}): use --solver highs") from error
        raise


def _options(model: Any, seed: int, time_limit_s: float, gap: float) -> None:
    options = {
        "Seed": seed,
        "Threads": 1,
        "TimeLimit": float(time_limit_s),
        "MIPGap": gap,
        "MIPGapAbs": 1e-9,
        "FeasibilityTol": TOLERANCE,
        "IntFeasTol": TOLERANCE,
        "DualReductions": 0,
    }
    for name, value in options.items():
        model.setParam(name, value)


def _fill(gurobipy: Any, model: Any, program: IntegerProgram) -> None:
    kinds = np.where(program.integer, gurobipy.GRB.INTEGER, gurobipy.GRB.CONTINUOUS)
    columns = model.addVars(
        len(program.cost), lb=program.lower, ub=program.upper, obj=program.cost, vtype=kinds.tolist()
    ).values()
    variables = list(columns)
    for row, (low, high) in enumerate(zip(program.row_lower, program.row_upper, strict=True)):
        place = slice(program.indptr[row], program.indptr[row + 1])
        terms = gurobipy.LinExpr(program.data[place].tolist(), [variables[i] for i in program.indices[place]])
        if low == high:
            model.addLConstr(terms, "=", low)
            continue
        if low > -inf:
            model.addLConstr(terms, ">", low)
        if high < inf:
            model.addLConstr(terms, "<", high)


def _answer(gurobipy: Any, model: Any, program: IntegerProgram) -> Solution:
    known = gurobipy.GRB
    if model.Status == known.INFEASIBLE:
        return solution(program, "infeasible", None, inf)
    if model.Status in (known.UNBOUNDED, known.INF_OR_UNBD):
        raise DercError("the integer program is unbounded: one of its variables lacks a bound")
    found = model.SolCount > 0
    x = np.array([variable.X for variable in model.getVars()]) if found else None
    if model.Status == known.OPTIMAL:
        return solution(program, "optimal", x, float(model.ObjBound if model.IsMIP else model.ObjVal))
    return solution(program, "feasible" if found else "unknown", x, float(model.ObjBound) if model.IsMIP else -inf)
