"""A solver-neutral sparse integer program and the protocol of its solvers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from derc.artifacts import Array


@dataclass(frozen=True)
class IntegerProgram:
    """min cost·x  subject to  row_lower ≤ A x ≤ row_upper,  lower ≤ x ≤ upper,  x_i integer where `integer[i]`.

    A is in compressed sparse row form: row r has columns `indices[indptr[r]:indptr[r + 1]]` with the values at the same
    places of `data`. Infinite bounds are ±inf.
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


@dataclass(frozen=True)
class Solution:
    """`status` is optimal, feasible (time limit with an incumbent), infeasible or unknown; `x` is None without an incumbent."""

    status: str
    x: Array | None
    objective: float
    bound: float
    gap: float


class Solver(Protocol):
    """An integer programming solver."""

    name: ClassVar[str]

    def solve(self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6) -> Solution:
        """Minimise; deterministic for equal input."""
