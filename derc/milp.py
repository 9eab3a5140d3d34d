"""A solver-neutral sparse integer program, a builder for it, and the protocol of its solvers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import ClassVar, Protocol

import numpy as np

from derc.artifacts import Array
from derc.errors import MissingDependencyError
from derc.registry import SOLVERS, load


@dataclass(frozen=True)
class IntegerProgram:
    """min cost·x  subject to  row_lower ≤ A x ≤ row_upper,  lower ≤ x ≤ upper,  x_i integer where `integer[i]`.

    A is in compressed sparse row form: row r has columns `indices[indptr[r]:indptr[r + 1]]` with the values at the same
    places of `data`. Infinite bounds are ±inf. `names` belong to the columns, `row_names` to the rows.
    """

    cost: Array
    indptr: Array
    indices: Array
    data: Array
    row_lower: Array
    row_upper: Array
    lower: Array
    upper: Array
    integer: Array
    names: tuple[str, ...] = ()
    row_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Solution:
    """`status` is optimal, feasible (time limit with an incumbent), infeasible or unknown (then `x` is None).

    `solver` is the name of the one that answered, where it is not the one that was asked.
    """

    status: str
    x: Array | None
    objective: float
    bound: float
    gap: float
    solver: str = ""


class Solver(Protocol):
    """An integer programming solver."""

    @property
    def name(self) -> str: ...

    def solve(
        self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6, start: Array | None = None
    ) -> Solution:
        """Minimise; deterministic for equal input. `start` (variables) is a point to begin from, feasible or not."""


class SizeLimitError(MissingDependencyError):
    """The program is larger than the solver's licence allows."""


@dataclass(frozen=True)
class Exact:
    """derc's own search, which answers where the program is one over paths; `general` solves all other programs."""

    general: Solver
    name: ClassVar[str] = "derc"

    def solve(
        self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6, start: Array | None = None
    ) -> Solution:
        """Minimise with the general solver, whose name the answer bears."""
        answer = self.general.solve(program, time_limit_s=time_limit_s, gap=gap, start=start)
        return replace(answer, solver=answer.solver or self.general.name)


@dataclass(frozen=True)
class Limited:
    """A solver whose licence may be too small for a program: `other` then solves it, and `say` is told."""

    first: Solver
    other: Solver
    say: Callable[[str], object]

    @property
    def name(self) -> str:
        return self.first.name

    def solve(
        self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6, start: Array | None = None
    ) -> Solution:
        """Minimise; an answer by the other solver bears its name."""
        try:
            return self.first.solve(program, time_limit_s=time_limit_s, gap=gap, start=start)
        except SizeLimitError as error:
            self.say(f"{error}; solved by {self.other.name} instead")
        answer = self.other.solve(program, time_limit_s=time_limit_s, gap=gap, start=start)
        return replace(answer, solver=self.other.name)


@dataclass
class Builder:
    """Collects named variables and rows; `build` gives the sparse program."""

    names: list[str] = field(default_factory=list)
    bounds: list[tuple[float, float, float, bool]] = field(default_factory=list)
    rows: list[tuple[str, dict[int, float], float, float]] = field(default_factory=list)

    def variable(
        self, name: str, cost: float = 0.0, *, lower: float = 0.0, upper: float = 1.0, integer: bool = True
    ) -> int:
        """Add a variable (binary unless said otherwise) and return its column."""
        self.names.append(name)
        self.bounds.append((cost, lower, upper, integer))
        return len(self.names) - 1

    def row(self, name: str, terms: Mapping[int, float], *, lower: float = -inf, upper: float = inf) -> None:
        """Add lower ≤ Σ value · x[column] ≤ upper over the (column, value) pairs of `terms`; zeros are left out."""
        self.rows.append((name, {column: value for column, value in terms.items() if value != 0}, lower, upper))

    def build(self) -> IntegerProgram:
        """The program of everything added so far."""
        cost, lower, upper, integer = zip(*self.bounds, strict=True) if self.bounds else ((), (), (), ())
        lengths = [len(terms) for _, terms, _, _ in self.rows]
        return IntegerProgram(
            cost=np.array(cost, float),
            indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            indices=np.array([column for _, terms, _, _ in self.rows for column in terms], np.int32),
            data=np.array([value for _, terms, _, _ in self.rows for value in terms.values()], float),
            row_lower=np.array([low for _, _, low, _ in self.rows], float),
            row_upper=np.array([high for _, _, _, high in self.rows], float),
            lower=np.array(lower, float),
            upper=np.array(upper, float),
            integer=np.array(integer, bool),
            names=tuple(self.names),
            row_names=tuple(name for name, _, _, _ in self.rows),
        )


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def relative_gap(objective: float, bound: float) -> float:
    """|objective − bound| / |objective|, 0 where they agree and inf where the bound is not known."""
    if not isfinite(bound):
        return inf
    difference = abs(objective - bound)
    return 0.0 if difference < 1e-12 else difference / max(abs(objective), 1e-12)


def solution(program: IntegerProgram, status: str, x: Array | None, bound: float) -> Solution:
    """The solver's answer with integers made exact, and the objective and gap that follow from them."""
    if x is None:
        return Solution(status, None, inf, bound, inf)
    exact = np.where(program.integer, np.round(x), x)
    objective = float(program.cost @ exact)
    bound = min(bound, objective)
    return Solution(status, exact, objective, bound, relative_gap(objective, bound))


def choose(name: str, say: Callable[[str], object] = _tell) -> Solver:
    """The solver called `name`: `derc` is the search of our own, with HiGHS for what it cannot express.

    `auto` is the same with Gurobi in place of HiGHS where its licence is found. Gurobi leaves programs beyond its
    licence's size to HiGHS, and `say` is told. Raises UsageError for an unknown name, MissingDependencyError where the
    solver's package is not installed.
    """
    if name == "auto":
        return Exact(choose("gurobi" if load(SOLVERS, "gurobi").available() else "highs", say))
    if name == "derc":
        return Exact(choose("highs", say))
    solver: Solver = load(SOLVERS, name)()
    return Limited(solver, choose("highs", say), say) if name == "gurobi" else solver
