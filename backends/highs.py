"""highs: the HiGHS integer programming solver (MIT licence)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import numpy as np

from derc.artifacts import Array
from derc.errors import DercError
from derc.milp import IntegerProgram, Solution, solution

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Highs:
    """Solves on one thread with a fixed seed, printing nothing."""

    seed: int = 0
    name: ClassVar[str] = "highs"

    @classmethod
    def available(cls) -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec("highspy") is not None

    def solve(
        self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6, start: Array | None = None
    ) -> Solution:
        """Minimise to the relative `gap`; `time_limit_s` is wall-clock, `start` a point to begin from.

        Raises DercError for an unbounded program.
        """
        import highspy

        solver = _loaded(highspy, program, self._options(time_limit_s, gap))
        if start is not None:
            begun = highspy.HighsSolution()
            begun.col_value = start
            solver.setSolution(begun)
        solver.run()
        return _answer(highspy, solver, program)

    def _options(self, time_limit_s: float, gap: float) -> dict[str, bool | int | float | str]:
        return {
            "output_flag": False,
            "log_to_console": False,
            "threads": 1,
            "parallel": "off",
            "random_seed": self.seed,
            "time_limit": float(time_limit_s),
            "mip_rel_gap": gap,
            "mip_abs_gap": 1e-9,
            "mip_feasibility_tolerance": TOLERANCE,
            "primal_feasibility_tolerance": TOLERANCE,
        }


def _loaded(highspy: Any, program: IntegerProgram, options: dict[str, bool | int | float | str]) -> Any:
    solver = _silent(highspy)()
    for option, value in options.items():
        solver.setOptionValue(option, value)
    solver.passModel(_model(highspy, program))
    return solver


def _silent(highspy: Any) -> Any:
    """The solver class without the banner that its constructor prints to stdout by enabling callbacks."""

    def enable(self: Any) -> None:
        self.setOptionValue("output_flag", False)
        highspy.Highs.enableCallbacks(self)

    return type("Silent", (highspy.Highs,), {"enableCallbacks": enable})


def _model(highspy: Any, program: IntegerProgram) -> Any:
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(program.cost), len(program.row_lower)
    model.col_cost_ = program.cost
    model.col_lower_, model.col_upper_ = _bounds(highspy, program.lower), _bounds(highspy, program.upper)
    model.row_lower_, model.row_upper_ = _bounds(highspy, program.row_lower), _bounds(highspy, program.row_upper)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.num_col_, model.a_matrix_.num_row_ = model.num_col_, model.num_row_
    model.a_matrix_.start_ = program.indptr
    model.a_matrix_.index_ = program.indices
    model.a_matrix_.value_ = program.data
    kinds = highspy.HighsVarType
    if program.integer.any():
        model.integrality_ = [kinds.kInteger if integer else kinds.kContinuous for integer in program.integer]
    return model


def _bounds(highspy: Any, values: Array) -> Array:
    return np.clip(values, -highspy.kHighsInf, highspy.kHighsInf)


def _answer(highspy: Any, solver: Any, program: IntegerProgram) -> Solution:
    status, info = solver.getModelStatus(), solver.getInfo()
    known = highspy.HighsModelStatus
    if status == known.kInfeasible:
        return solution(program, "infeasible", None, inf)
    if status == known.kModelEmpty:
        return _empty(program)
    if status in (known.kUnbounded, known.kUnboundedOrInfeasible):
        raise DercError("the integer program is unbounded: one of its variables lacks a bound")
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    x = np.array(solver.getSolution().col_value) if found else None
    if status == known.kOptimal:
        bound = info.mip_dual_bound if program.integer.any() else info.objective_function_value
        return solution(program, "optimal", x, float(bound))
    return solution(program, "feasible" if found else "unknown", x, float(info.mip_dual_bound) if found else -inf)


def _empty(program: IntegerProgram) -> Solution:
    """Answer for a program without columns: its rows are all zero."""
    fits = bool(np.all(program.row_lower <= 0) and np.all(program.row_upper >= 0))
    return solution(program, "optimal", np.zeros(0), 0.0) if fits else solution(program, "infeasible", None, inf)
