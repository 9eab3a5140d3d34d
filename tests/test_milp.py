"""The builder of integer programs."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from derc.errors import UsageError
from derc.milp import Builder, choose, relative_gap, solution


def test_build_gives_compressed_rows_in_order() -> None:
    builder = Builder()
    x, y = builder.variable("x", 2.0), builder.variable("y", lower=-1, upper=inf, integer=False)
    builder.row("both", {x: 1.0, y: 3.0}, upper=4)
    builder.row("one", {x: 0.0, y: 5.0}, lower=1, upper=1)
    program = builder.build()
    assert program.names == ("x", "y")
    assert program.row_names == ("both", "one")
    assert program.indptr.tolist() == [0, 2, 3]
    assert program.indices.tolist() == [0, 1, 1]
    assert program.data.tolist() == [1, 3, 5]
    assert program.row_lower.tolist() == [-inf, 1]
    assert program.row_upper.tolist() == [4, 1]
    assert program.lower.tolist() == [0, -1]
    assert program.integer.tolist() == [True, False]


def test_an_empty_program_has_one_row_pointer() -> None:
    assert Builder().build().indptr.tolist() == [0]


@pytest.mark.parametrize(("objective", "bound", "gap"), [(2.0, 1.0, 0.5), (3.0, 3.0, 0.0), (1.0, -inf, inf)])
def test_relative_gap(objective: float, bound: float, gap: float) -> None:
    assert relative_gap(objective, bound) == gap


def test_a_solution_has_exact_integers_and_no_bound_above_its_objective() -> None:
    builder = Builder()
    builder.variable("x", 1.0)
    builder.variable("y", 1.0, integer=False)
    answer = solution(builder.build(), "optimal", np.array([0.9999999, 0.25]), 1.2500001)
    assert answer.x is not None
    assert answer.x.tolist() == [1.0, 0.25]
    assert answer.bound == answer.objective == 1.25


def test_an_unknown_solver_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'highs'"):
        choose("hihgs")
