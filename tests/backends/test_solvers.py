"""The solvers against scipy's, and what they say of programs that have no answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from derc.backends.gurobi import Gurobi
from derc.backends.highs import Highs
from derc.errors import DercError, MissingDependencyError
from derc.milp import Builder, Exact, IntegerProgram, SizeLimitError, Solver, choose

SOLVERS: list[Solver] = [Highs(), Gurobi()]
both = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)


def random_program(seed: int, columns: int, rows: int) -> IntegerProgram:
    random = np.random.default_rng(seed)
    builder = Builder()
    for i in range(columns):
        builder.variable(f"x{i}", random.normal(), lower=-2, upper=3, integer=bool(random.random() < 0.7))
    for r in range(rows):
        terms = {i: float(random.integers(-3, 4)) for i in range(columns)}
        middle, slack = random.normal(), random.choice([0.0, 1.0, 3.0])
        low = middle - slack if random.random() < 0.6 else -np.inf
        builder.row(f"r{r}", terms, lower=low, upper=middle + slack)
    return builder.build()


def knapsack(columns: int, seed: int = 0) -> IntegerProgram:
    random = np.random.default_rng(seed)
    builder = Builder()
    weights = [random.integers(100, 1000, columns) for _ in range(6)]
    for i in range(columns):
        builder.variable(f"x{i}", -float(sum(w[i] for w in weights)) - random.random())
    for r, weight in enumerate(weights):
        builder.row(f"w{r}", {i: float(w) for i, w in enumerate(weight)}, upper=float(weight.sum() // 2) + 0.5)
    return builder.build()


def oracle(program: IntegerProgram) -> float | None:
    matrix = csr_matrix((program.data, program.indices, program.indptr), (len(program.row_lower), len(program.cost)))
    found = milp(
        program.cost,
        integrality=program.integer.astype(int),
        bounds=Bounds(program.lower, program.upper),
        constraints=LinearConstraint(matrix, program.row_lower, program.row_upper),
    )
    assert found.status in (0, 2)
    return None if found.status == 2 else float(found.fun)


@both
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), columns=st.integers(1, 7), rows=st.integers(0, 5))
def test_agrees_with_scipy(solver: Solver, seed: int, columns: int, rows: int) -> None:
    program = random_program(seed, columns, rows)
    answer, truth = solver.solve(program), oracle(program)
    if truth is None:
        assert answer.status == "infeasible"
        assert answer.x is None
        return
    assert answer.status == "optimal"
    assert answer.objective == pytest.approx(truth, abs=1e-5)
    assert answer.bound <= answer.objective
    assert answer.gap <= 1e-5
    assert answer.x is not None
    assert np.array_equal(answer.x[program.integer], np.round(answer.x[program.integer]))


@both
def test_equal_input_gives_an_equal_answer(solver: Solver) -> None:
    first, second = (solver.solve(knapsack(15)) for _ in range(2))
    assert np.array_equal(first.x, second.x)
    assert first == first.__class__(second.status, first.x, second.objective, second.bound, second.gap)


@both
def test_a_program_without_columns_or_rows(solver: Solver) -> None:
    assert solver.solve(Builder().build()).status == "optimal"
    builder = Builder()
    builder.variable("x", -1.0, upper=4)
    assert solver.solve(builder.build()).objective == -4


@both
def test_an_unbounded_program_is_an_error(solver: Solver) -> None:
    builder = Builder()
    builder.variable("x", -1.0, upper=np.inf, integer=False)
    with pytest.raises(DercError, match="unbounded"):
        solver.solve(builder.build())


@both
def test_the_time_limit_keeps_the_incumbent(solver: Solver) -> None:
    answer = solver.solve(knapsack(200), time_limit_s=0.5, gap=0.0)
    assert answer.status == "feasible"
    assert answer.x is not None
    assert answer.bound < answer.objective
    assert answer.gap > 0


@both
def test_no_time_at_all_is_unknown_or_better(solver: Solver) -> None:
    answer = solver.solve(knapsack(200), time_limit_s=0.0)
    assert answer.status in ("unknown", "feasible")
    assert (answer.x is None) == (answer.status == "unknown")


@both
def test_prints_nothing_in_a_process_of_its_own(solver: Solver) -> None:
    kind = type(solver)
    program = (
        f"from {kind.__module__} import {kind.__name__} as S; from derc.milp import Builder\n"
        "b = Builder(); b.variable('x', -1.0); b.row('r', {0: 1.0}, upper=1); S().solve(b.build())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_size_limited_licence_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GRB_LICENSE_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SizeLimitError, match=r"3000 variables.*--solver highs"):
        Gurobi().solve(knapsack(3000))


def test_what_is_too_large_for_gurobis_licence_is_solved_by_highs_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GRB_LICENSE_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    solver = choose("gurobi", said.append)
    answer = solver.solve(easy(3000))
    assert (answer.status, answer.solver, answer.objective) == ("optimal", "highs", -1.0)
    assert len(said) == 1 and "larger than Gurobi's size-limited licence" in said[0] and "by highs instead" in said[0]
    assert solver.solve(easy(30)).solver == "" and solver.name == "gurobi"


def test_without_a_licence_gurobi_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, for Gurobi reads its licence once."""
    (tmp_path / "gurobi.lic").write_text("TOKENSERVER=nowhere.invalid\n")
    program = (
        "from derc.backends.gurobi import Gurobi; from derc.milp import Builder\n"
        "b = Builder(); b.variable('x', -1.0); Gurobi().solve(b.build())"
    )
    environment = {**os.environ, "GRB_LICENSE_FILE": str(tmp_path / "gurobi.lic"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "MissingDependencyError: Gurobi has no valid licence" in done.stderr


def easy(columns: int) -> IntegerProgram:
    """At most one of many."""
    builder = Builder()
    for i in range(columns):
        builder.variable(f"x{i}", -1.0)
    builder.row("one", dict.fromkeys(range(columns), 1.0), upper=1)
    return builder.build()


@both
def test_a_start_is_taken_and_changes_no_answer(solver: Solver) -> None:
    program = knapsack(15)
    plain = solver.solve(program)
    assert plain.x is not None
    assert solver.solve(program, start=plain.x).objective == pytest.approx(plain.objective, abs=1e-6)
    assert solver.solve(program, start=np.ones(15)).objective == pytest.approx(plain.objective, abs=1e-6)


@both
def test_without_time_a_feasible_start_is_the_incumbent(solver: Solver) -> None:
    program = knapsack(200)
    start = np.zeros(200)
    start[:3] = 1
    answer = solver.solve(program, start=start, time_limit_s=0.02, gap=0.0)
    assert answer.status == "feasible"
    assert answer.objective <= float(program.cost @ start)


@both
def test_what_no_point_satisfies_is_infeasible(solver: Solver) -> None:
    builder = Builder()
    x, y = builder.variable("x"), builder.variable("y")
    builder.row("both", {x: 1.0, y: 1.0}, lower=3)
    answer = solver.solve(builder.build())
    assert (answer.status, answer.x) == ("infeasible", None)


def general(name: str) -> str:
    """Who solves what derc's own search cannot."""
    solver = choose(name)
    assert isinstance(solver, Exact) and solver.name == "derc"
    return solver.general.name


def test_a_licence_counts_only_where_a_file_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GRB_LICENSE_FILE", raising=False)
    monkeypatch.setattr("derc.backends.gurobi.LICENCE_FOLDERS", (tmp_path / "gurobi",))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not Gurobi.available()
    assert general("auto") == "highs"
    licence = tmp_path / "elsewhere.lic"
    licence.write_text("TYPE=FULL\n")
    monkeypatch.setenv("GRB_LICENSE_FILE", str(licence))
    assert Gurobi.available()
    assert general("auto") == "gurobi"
    assert general("derc") == "highs"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not Gurobi.available()
    with pytest.raises(MissingDependencyError, match=r"derc\[gurobi\]"):
        choose("gurobi")
