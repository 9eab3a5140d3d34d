"""The selection against enumeration of all paths, for every budget and both solvers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import derc.enumeration
import derc.paths
from derc.artifacts import Array, Assembly, Evaluated, Knowledge
from derc.backends.gurobi import Gurobi
from derc.backends.highs import Highs
from derc.errors import DercError, InfeasibleError, UsageError
from derc.learnt import Learnt
from derc.milp import Exact, IntegerProgram, Solution, Solver
from derc.passes.select import LOWER, Select, select, spans
from derc.selection_program import PathProgram
from derc.selection_search import best
from tests.layers import Problem, amounts, fits, paths, random_knowledge, random_problem
from tests.threads import on_one_and_two
from tests.zoos import latency

RESOURCES = ("latency_ms", "params_m", "macs_g", "memory_mb")
EXACT = Exact(Highs())
both = pytest.mark.parametrize("solver", [Highs(), Gurobi(), EXACT], ids=lambda solver: solver.name)


def budgeted(
    problem: Problem, learnt: Learnt, options: Select, names: tuple[str, ...], share: float, lower: float = 0.0
) -> Select:
    """`options` with budgets at the quantile `share` of what the assemblies take, and at `lower` times that."""
    taken = [amounts(learnt, options, assembly) for assembly in paths(learnt)]
    upper = {n: float(np.quantile([t[n] for t in taken], share)) for n in names}
    least = {n: float(np.quantile([t[n] for t in taken], share * lower)) for n in names if lower and n in LOWER}
    return replace(options, **upper, **{f"min_{n}": limit for n, limit in least.items()})


def spans_of(assembly: Assembly) -> set[tuple[str, int, int]]:
    """The blocks whatever their precision."""
    return {(block.donor, block.first, block.last) for block in assembly.blocks}


def overlap(one: Assembly, other: Assembly) -> int:
    return len(spans_of(one) & spans_of(other))


def enumerate_top(learnt: Learnt, options: Select) -> list[float]:
    """Losses of the top solutions, each the best that differs enough from those before."""
    feasible = sorted((a for a in paths(learnt) if fits(learnt, options, a)), key=learnt.expected_loss)
    chosen: list[Assembly] = []
    if options.fresh:
        feasible = [a for a in feasible if a not in learnt.losses]
        chosen = [a for a, loss in learnt.losses.items() if fits(learnt, options, a) and loss < 1]
    known = len(chosen)
    for assembly in feasible:
        far = all(overlap(a, assembly) <= max(len(a.blocks) - options.diversity, 0) for a in chosen)
        if far and len(chosen) < known + options.top:
            chosen.append(assembly)
    return [learnt.expected_loss(assembly) for assembly in chosen[known:]]


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(3, 6), min_size=1, max_size=3),
    names=st.sets(st.sampled_from(RESOURCES)),
    share=st.floats(0.05, 1.0),
    options=st.builds(
        Select,
        top=st.integers(1, 4),
        diversity=st.integers(1, 3),
        margin=st.sampled_from([0.0, 0.15]),
        one_per_set=st.booleans(),
        heads=st.sampled_from([(), ("d0",)]),
        fresh=st.booleans(),
    ),
    evaluated=st.integers(0, 6),
    lower=st.sampled_from([(), ("int8",), ("fp16", "int8")]),
    least=st.sampled_from([0.0, 0.5, 0.9]),
    longest=st.sampled_from([None, 1, 2]),
    formed=st.booleans(),
)
def test_against_enumeration(
    solver: Solver,
    seed: int,
    sizes: list[int],
    names: set[str],
    share: float,
    options: Select,
    evaluated: int,
    lower: tuple[str, ...],
    least: float,
    longest: int | None,
    formed: bool,
) -> None:
    problem = random_problem(seed, tuple(sizes), lower=lower, formed=formed)
    options = replace(options, max_blocks=longest)
    learnt = problem.learn(options, random_knowledge(seed, problem.learn(options), evaluated))
    assume(any(True for _ in paths(learnt)))
    options = budgeted(problem, learnt, options, tuple(sorted(names)), share, least)
    truth = enumerate_top(learnt, options)
    if not truth and options.fresh and learnt.losses:
        assert not select(learnt, options, solver).candidates
        return
    if not truth:
        with pytest.raises(InfeasibleError):
            select(learnt, options, solver)
        return
    found = select(learnt, options, solver)
    assert [c.objective for c in found.candidates] == pytest.approx(truth, abs=1e-6)
    assert all(fits(learnt, options, candidate.assembly) for candidate in found.candidates)
    assert all(c.predicted == learnt.predict(c.assembly) for c in found.candidates)
    assert found.status == "optimal"
    assert found.bound <= found.objective <= found.bound + 1e-5


@both
def test_no_regret(solver: Solver) -> None:
    problem = random_problem(1, (6, 5, 4, 5))
    for name, known in problem.table.donors.items():
        options = Select(latency_ms=known.high_ms, margin=0.3, top=1)
        learnt = problem.learn(options)
        assert fits(learnt, options, problem.intact(name))
        assert select(learnt, options, solver).objective <= learnt.expected_loss(problem.intact(name)) + 1e-9


@both
def test_later_solutions_differ_by_the_diversity(solver: Solver) -> None:
    problem = random_problem(2, (6, 6, 6), blocks=4)
    options = Select(top=6, diversity=2)
    found = [c.assembly for c in select(problem.learn(options), options, solver).candidates]
    assert len(found) == 6
    for place, later in enumerate(found):
        assert all(overlap(earlier, later) <= len(earlier.blocks) - 2 for earlier in found[:place])


def test_what_measured_over_budget_is_not_proposed_again() -> None:
    problem = random_problem(3, (5, 5, 5))
    options = Select(latency_ms=float(np.median([known.ms for known in problem.table.donors.values()])))
    knowledge, best = Knowledge(), None
    for _ in range(5):
        found = select(problem.learn(options, knowledge), options, Highs()).candidates
        assert all(one.assembly not in [c.assembly for c in found] for one in knowledge.evaluated)
        best = found[0].assembly
        over = Evaluated(best, None, latency(1.05 * (options.latency_ms or 0)))
        knowledge = Knowledge((*knowledge.evaluated, over))


def test_a_good_assembly_that_was_evaluated_is_proposed_again() -> None:
    problem = random_problem(3, (5, 5, 5))
    options = Select()
    last = select(problem.learn(options), options, Highs()).candidates[-1].assembly
    learnt = problem.learn(options, Knowledge((Evaluated(last, 0.999),)))
    found = {one.assembly: one.objective for one in select(learnt, options, Highs()).candidates}
    assert found[last] == pytest.approx(0.001)
    assert learnt.loss.sum() < problem.learn(options).loss.sum()


def test_fresh_candidates_were_not_evaluated_before_until_none_is_left() -> None:
    problem = random_problem(3, (4, 4), blocks=2)
    options, known = Select(top=3, fresh=True), Knowledge()
    total = sum(not path.intact for path in paths(problem.learn(options)))
    for _ in range(total + 1):
        found = select(problem.learn(options, known), options, Highs()).candidates
        assert not {c.assembly for c in found} & {one.assembly for one in known.evaluated}
        known = Knowledge((*known.evaluated, *(Evaluated(c.assembly, 0.5) for c in found)))
    assert not found
    assert len(known.evaluated) == total


def test_an_unreachable_budget_names_the_best_that_is_achievable() -> None:
    problem = random_problem(4, (5, 5))
    options = Select(latency_ms=0.01)
    learnt = problem.learn(options)
    fastest = min(paths(learnt), key=lambda a: amounts(learnt, options, a)["latency_ms"])
    least = amounts(learnt, options, fastest)["latency_ms"]
    with pytest.raises(InfeasibleError) as caught:
        select(learnt, options, Highs())
    assert str(caught.value) == (
        f"no assembly of these donors meets --latency-ms 0.01: "
        f"the fastest that is achievable is {least:.4g} ms ({spans(fastest)}, predicted)"
    )


def test_each_unreachable_budget_is_named_and_only_those() -> None:
    problem = random_problem(4, (5, 5))
    options = Select(latency_ms=1e6, params_m=1e-6, macs_g=1e-9, memory_mb=1e-5)
    with pytest.raises(
        InfeasibleError, match=r"--params-m 1e-06 and --macs-g 1e-09 and --memory-mb 1e-05: the"
    ) as caught:
        select(problem.learn(options), options, Highs())
    assert "--latency-ms" not in str(caught.value)
    assert "together" not in str(caught.value)


def test_budgets_that_only_clash_together_are_all_named() -> None:
    for seed in range(50):
        problem = random_problem(seed, (5, 5))
        options = Select()
        learnt = problem.learn(options)
        taken = [amounts(learnt, options, assembly) for assembly in paths(learnt)]
        least = {name: min(t[name] for t in taken) for name in ("latency_ms", "params_m")}
        if not any(all(t[name] <= least[name] * 1.001 for name in least) for t in taken):
            break
    options = Select(latency_ms=least["latency_ms"] * 1.0005, params_m=least["params_m"] * 1.0005)
    with pytest.raises(InfeasibleError, match=r"--latency-ms .* and --params-m .* together: the fastest .* smallest"):
        select(learnt, options, Highs())


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", RESOURCES)
def test_a_budget_must_be_a_positive_number(name: str, limit: float) -> None:
    with pytest.raises(UsageError, match="must be a positive number"):
        _ = Select(**cast(Any, {name: limit})).budgets


@pytest.mark.parametrize(
    ("options", "message"),
    [(Select(margin=1.0), "margin"), (Select(top=0), "top"), (Select(heads=("nobody",)), "no donor has a head")],
)
def test_bad_options(options: Select, message: str) -> None:
    problem = random_problem(0, (4,))
    with pytest.raises(UsageError, match=message):
        select(problem.learn(options), options, Highs())


def test_without_a_table_there_is_no_latency_budget_but_the_others_work() -> None:
    problem = random_problem(0, (4, 4))
    learn = (problem.cuts, problem.embedded, problem.partition, None, Knowledge())
    options = Select(params_m=1.0)
    found = select(options.learn(*learn), options, Highs())
    assert found.candidates[0].predicted["latency_ms"] is None
    with pytest.raises(UsageError, match="needs a latency table"):
        select(options.learn(*learn), Select(latency_ms=1.0), Highs())


class Slow:
    """A solver whose time is always out."""

    name = "slow"

    def solve(
        self, program: IntegerProgram, *, time_limit_s: float = 60.0, gap: float = 1e-6, start: Array | None = None
    ) -> Solution:
        return Solution("unknown", None, np.inf, -np.inf, np.inf)


def test_time_out_without_an_answer_says_so() -> None:
    problem = random_problem(0, (4, 4))
    with pytest.raises(DercError, match="slow found no assembly within 60 s"):
        select(problem.learn(Select()), Select(), Slow())


class Bench:
    """The parts of a context that the pass reads."""

    solver = Highs()


def test_a_zoo_of_one_donor_selects_itself_and_the_pass_runs_from_a_context() -> None:
    problem = random_problem(0, (6,), blocks=4)
    step, context = Select(), cast(Any, Bench())
    found = step.run(context, problem.cuts, problem.embedded, problem.partition, problem.table, Knowledge())
    assert found.candidates[0].assembly == problem.intact("d0")
    assert found.solver == step.inputs(context) == "highs"
    learnt = step.learn(problem.cuts, problem.embedded, problem.partition, problem.table, Knowledge())
    assert learnt.predict(problem.intact("d0")) == found.candidates[0].predicted


def test_where_the_blocks_that_were_built_meet_in_no_path_that_is_said() -> None:
    problem = random_problem(0, (6,), blocks=3)
    last = str(problem.partition.blocks["d0"][-1])
    table = replace(problem.table, blocks={last: problem.table.blocks[last]})
    with pytest.raises(InfeasibleError, match="no network can be put together"):
        select(replace(problem, table=table).learn(Select()), Select(), Highs())


def in_int8(assembly: Assembly) -> Assembly:
    return Assembly(tuple(replace(block, precision="int8") for block in assembly.blocks))


def test_of_one_network_only_the_best_form_is_proposed() -> None:
    problem = random_problem(2, (6, 6, 6), blocks=4, lower=("fp16", "int8"))
    found = [c.assembly for c in select(problem.learn(Select()), Select(top=12), Highs()).candidates]
    assert len({assembly.plain for assembly in found}) == len(found) == 12


def test_a_donor_over_the_budget_comes_back_in_int8_and_one_that_fits_does_not() -> None:
    problem = random_problem(3, (5,))
    chain, table = problem.partition.blocks["d0"], problem.table
    low = {str(b): latency(0.4 * table.blocks[str(b.plain)].ms) for b in in_int8(Assembly(chain)).blocks}
    both_forms = replace(table, blocks={**table.blocks, **low}, distortion=dict.fromkeys(low, 0.01))
    learnt = replace(problem, table=both_forms).learn(Select())
    own = table.donors["d0"]
    tight = Select(latency_ms=0.9 * own.ms, fresh=True, top=1, params_m=learnt.predict(Assembly(chain))["params"] / 1e6)
    (found,) = select(learnt, tight, Highs()).candidates
    assert found.assembly.plain == Assembly(chain) and not found.assembly.intact
    wide = select(learnt, replace(tight, latency_ms=2 * own.ms, one_per_set=True), Highs())
    assert found.assembly.plain not in [c.assembly.plain for c in wide.candidates]


def test_a_form_that_failed_does_not_stand_for_the_others() -> None:
    problem = random_problem(3, (5,), lower=("fp16", "int8"))
    options = Select(top=1, fresh=True, one_per_set=True)
    failed, seen = Knowledge((Evaluated(problem.intact("d0"), 0.0),)), set()
    for _ in range(3):
        (found,) = select(problem.learn(options, failed), options, Highs()).candidates
        assert found.assembly not in seen
        seen.add(found.assembly)
        failed = Knowledge((*failed.evaluated, Evaluated(found.assembly, 0.0)))


def test_a_lower_budget_above_its_upper_one_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"--min-params-m 2 is above --params-m 1"):
        _ = Select(params_m=1.0, min_params_m=2.0).budgets


@both
def test_an_unreachable_lower_budget_names_the_largest(solver: Solver) -> None:
    problem = random_problem(4, (5, 5))
    learnt = problem.learn(Select())
    most = max(amounts(learnt, Select(), assembly)["params_m"] for assembly in paths(learnt))
    with pytest.raises(InfeasibleError, match=rf"meets --min-params-m 1000: the largest .* is {most:.4g} M parameters"):
        select(learnt, Select(min_params_m=1000.0), solver)


@pytest.mark.parametrize("resource", [*RESOURCES, "blocks"])
@pytest.mark.parametrize("seed", range(5))
def test_the_least_of_each_resource_is_the_same_by_search_and_by_program(seed: int, resource: str) -> None:
    problem = random_problem(seed, (5, 4, 5), lower=("int8",) if seed % 2 else ())
    learnt = problem.learn(Select(), random_knowledge(seed, problem.learn(Select()), 4))
    program = PathProgram(learnt, 0.1)
    truth = Highs().solve(program.build(resource)).objective
    found = best(program, (), 1, resource=resource)
    assert found.bound == pytest.approx(truth, rel=1e-6)
    assert len(found.assemblies) == found.sure == 1


def test_out_of_time_with_an_incumbent_is_feasible_with_a_bound() -> None:
    problem = random_problem(2, (8,) * 8, blocks=4)
    options = Select(top=8, time_limit_s=1e-9, params_m=0.012)
    learnt = problem.learn(options)
    found, truth = select(learnt, options, EXACT), select(learnt, replace(options, time_limit_s=60.0), EXACT)
    assert (found.status, truth.status) == ("feasible", "optimal")
    assert found.bound <= truth.objective <= found.objective
    assert all(fits(learnt, options, candidate.assembly) for candidate in found.candidates)


def test_out_of_time_without_an_incumbent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(2, (8,) * 4, blocks=4)
    options = Select(time_limit_s=1e-9, params_m=0.012)
    monkeypatch.setattr(derc.paths, "BEAM", 1)
    monkeypatch.setattr(derc.enumeration, "SPREAD", 1)
    monkeypatch.setattr(derc.enumeration, "WIDTH", 1)
    for seed in range(30):
        learnt = random_problem(seed, (8,) * 4, blocks=4).learn(options)
        sizes = sorted(amounts(learnt, options, a)["params_m"] for a in paths(learnt))
        tight = replace(options, params_m=sizes[3], min_params_m=sizes[2])
        try:
            assert select(learnt, tight, EXACT).status == "feasible"
        except DercError as error:
            assert "derc found no assembly within 1e-09 s: allow more time" in str(error)
            return
    assert problem and pytest.fail("every beam found an assembly")


@both
def test_a_start_from_what_is_known_changes_nothing(solver: Solver) -> None:
    problem = random_problem(5, (6, 6, 5))
    learnt = problem.learn(Select(), random_knowledge(1, problem.learn(Select()), 6))
    program = PathProgram(learnt, 0.0)
    known = program.ready(())[0]
    built = program.build("loss")
    start = program.start(known, built)
    assert program.read(start) == known
    assert float(built.cost @ start) == pytest.approx(learnt.expected_loss(known))
    plain, begun = solver.solve(built), solver.solve(built, start=start)
    assert begun.objective == pytest.approx(plain.objective, abs=1e-7)


def test_an_answer_says_who_gave_it() -> None:
    learnt = random_problem(3, (4, 4)).learn(Select())
    assert [select(learnt, Select(), solver).solver for solver in (EXACT, Highs())] == ["derc", "highs"]


def test_a_search_far_apart_among_many_is_exact() -> None:
    problem = random_problem(11, (7,) * 10, blocks=4)
    options = Select(top=8, diversity=3)
    learnt = problem.learn(options)
    found = select(learnt, options, EXACT)
    chosen: list[Assembly] = []
    for assembly in sorted(paths(learnt), key=learnt.expected_loss):
        if len(chosen) < 8 and all(overlap(a, assembly) <= max(len(a.blocks) - 3, 0) for a in chosen):
            chosen.append(assembly)
    assert [c.objective for c in found.candidates] == pytest.approx([learnt.expected_loss(a) for a in chosen])


def test_one_thread_and_two_select_the_same() -> None:
    program = (
        "from tests.layers import random_problem; from derc.passes.select import Select, select\n"
        "from derc.backends.highs import Highs; from derc.milp import Exact\n"
        "p = random_problem(3, (8,) * 10, blocks=4, lower=('int8',)); o = Select(params_m=0.02, top=12)\n"
        "print(select(p.learn(o), o, Exact(Highs())))"
    )
    answers = on_one_and_two(program)
    assert len(answers) == 1 and "optimal" in answers.pop()
