"""select: the best assemblies within the budgets, by integer programming over the graph of blocks and stitches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar

from derc import intervals, layered
from derc.artifacts import (
    Assembly,
    Candidate,
    CutZoo,
    EmbeddedZoo,
    Knowledge,
    LatencyTable,
    Partition,
    Selection,
)
from derc.errors import DercError, InfeasibleError, UsageError
from derc.learnt import Learnt, learn
from derc.milp import Exact, Solution, Solver, relative_gap
from derc.pipeline import Context
from derc.selection_program import SLACK, Budget, PathProgram
from derc.selection_search import best

KINDS = {
    "latency_ms": ("--latency-ms", "ms", "fastest"),
    "params_m": ("--params-m", "M parameters", "smallest"),
    "macs_g": ("--macs-g", "G MACs", "lightest"),
    "memory_mb": ("--memory-mb", "MB", "least memory"),
    "blocks": ("--max-blocks", "blocks", "fewest blocks"),
}
LOWER = {
    "latency_ms": ("--min-latency-ms", "ms", "slowest"),
    "params_m": ("--min-params-m", "M parameters", "largest"),
    "macs_g": ("--min-macs-g", "G MACs", "heaviest"),
}
"""Lower limits; memory has none, for a peak that is too small is nobody's trouble."""


@dataclass(frozen=True)
class Select:
    """Finds the `top` best assemblies within all given budgets, each `diversity` blocks away from each better one.

    A block in another precision is the same block here: of the forms of one network only the best is proposed, for
    they would crowd out others (k blocks in p precisions make pᵏ forms). `min_…` are lower limits of the same amounts.
    `max_blocks` limits the pieces of an assembly, where a donor's consecutive blocks are one. With `interval` blocks
    begin and end at any cuts, see `derc.intervals`.
    Predicted latencies must stay below (1 − `margin`) of the budget, measured ones below the budget. `heads` are the
    donors that may provide the last block (none named: all). `one_per_set` forbids leaving out an equivalence set,
    `fresh` proposing what is known already, in other precisions too if it fits (then there may be no candidate).
    `time_limit_s` bounds all solves together.
    """

    latency_ms: float | None = None
    params_m: float | None = None
    macs_g: float | None = None
    memory_mb: float | None = None
    min_latency_ms: float | None = None
    min_params_m: float | None = None
    min_macs_g: float | None = None
    max_blocks: int | None = None
    top: int = 8
    diversity: int = 1
    margin: float = 0.0
    one_per_set: bool = False
    fresh: bool = False
    interval: bool = False
    heads: tuple[str, ...] = ()
    time_limit_s: float = 60.0
    name: ClassVar[str] = "select"
    produces: ClassVar[type] = Selection

    def inputs(self, context: Context) -> str:
        return context.solver.name

    def run(
        self,
        context: Context,
        cuts: CutZoo,
        embedded: EmbeddedZoo,
        partition: Partition,
        table: LatencyTable | None,
        knowledge: Knowledge,
    ) -> Selection:
        learnt = self.learn(cuts, embedded, partition, table, knowledge)
        return select(learnt, self, context.solver)

    def learn(
        self,
        cuts: CutZoo,
        embedded: EmbeddedZoo,
        partition: Partition,
        table: LatencyTable | None,
        knowledge: Knowledge,
    ) -> Learnt:
        """The graph of legal assemblies with predicted losses and latencies."""
        if self.interval and self.one_per_set:
            raise UsageError("one block from each equivalence set and blocks between any cuts exclude each other")
        table = intervals.extended(table, cuts, partition) if table and self.interval else table
        timed, weights = (table.blocks, table.weights) if table else (None, None)
        if self.interval:
            graph = intervals.build(cuts, partition, self.heads, timed=timed, weights=weights)
        else:
            one = self.one_per_set
            graph = layered.build(cuts, partition, self.heads, one_per_set=one, timed=timed, weights=weights)
        return learn(graph, cuts, embedded, table, knowledge)

    def large_enough(self, assembly: Assembly, predicted: Mapping[str, float | None]) -> bool:
        """Whether an assembly of these `predicted` amounts keeps to the lower limits and is of few enough pieces."""
        if self.max_blocks is not None and 1 + sum(assembly.stitched) > self.max_blocks:
            return False
        scales = {"latency_ms": 1 - self.margin, "params": 1e6, "macs": 1e9}
        lower = zip(scales.items(), (self.min_latency_ms, self.min_params_m, self.min_macs_g), strict=True)
        return all(
            least is None or (predicted[name] or 0.0) >= least * scale * (1 - SLACK) for (name, scale), least in lower
        )

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The given budgets; raises UsageError for one that is no positive number, or a lower above its upper one."""
        upper = [
            Budget(name, *_checked(KINDS[name], limit))
            for name in KINDS
            if (limit := self.max_blocks if name == "blocks" else getattr(self, name)) is not None
        ]
        lower = [
            Budget(name, *_checked(LOWER[name], limit), -1)
            for name in LOWER
            if (limit := getattr(self, f"min_{name}")) is not None
        ]
        most = {budget.resource: budget for budget in upper}
        for budget in lower:
            if budget.resource in most and budget.limit > most[budget.resource].limit:
                other = most[budget.resource]
                raise UsageError(f"{budget.option} {budget.limit:g} is above {other.option} {other.limit:g}")
        return (*upper, *lower)


def _checked(kind: tuple[str, str, str], limit: float) -> tuple[str, float, str, str]:
    """What a budget says of itself."""
    if not (isfinite(limit) and limit > 0):
        raise UsageError(f"{kind[0]} must be a positive number, not {limit}")
    return kind[0], limit, kind[1], kind[2]


def select(learnt: Learnt, options: Select, solver: Solver) -> Selection:
    """The best assemblies, best first, and how well the first is proved.

    Raises InfeasibleError, which names the smallest achievable amounts, where no assembly meets the budgets, UsageError
    for a latency budget without a latency table, DercError where time ran out before any assembly was found.
    """
    program, budgets = _program(learnt, options), options.budgets
    old, barred = _known(program, budgets) if options.fresh else ((), ())
    solve = _by_search if isinstance(solver, Exact) else _by_programs
    found = solve(program, budgets, options, solver, old, barred)
    if not found.assemblies and (old or barred) and found.status == "infeasible":
        return Selection((), found.solver, found.status, inf, inf, inf)
    if not found.assemblies:
        raise _failure(found.status, program, budgets, solver, options)
    candidates = tuple(Candidate(a, learnt.expected_loss(a), learnt.predict(a)) for a in found.assemblies)
    objective = candidates[0].objective
    bound = min(found.bound, objective)
    return Selection(candidates, found.solver, found.status, objective, bound, relative_gap(objective, bound))


@dataclass(frozen=True)
class _Found:
    """Assemblies, best first, with status and bound of the first one, and who found them."""

    assemblies: tuple[Assembly, ...]
    status: str
    bound: float
    solver: str


def _by_search(
    program: PathProgram,
    budgets: tuple[Budget, ...],
    options: Select,
    solver: Solver,
    old: tuple[Assembly, ...],
    barred: tuple[Assembly, ...],
) -> _Found:
    """All at once, by derc's own search."""
    deadline = time.monotonic() + options.time_limit_s
    apart = options.diversity
    answer = best(program, budgets, options.top, diversity=apart, earlier=old, barred=barred, deadline=deadline)
    return _Found(answer.assemblies, answer.status, answer.bound, solver.name)


def _by_programs(
    program: PathProgram,
    budgets: tuple[Budget, ...],
    options: Select,
    solver: Solver,
    old: tuple[Assembly, ...],
    barred: tuple[Assembly, ...],
) -> _Found:
    """One integer program after the other, each begun from the best known assembly that it allows."""
    deadline = time.monotonic() + options.time_limit_s
    ready = program.ready(budgets, barred)
    found: list[Assembly] = []
    proof: Solution | None = None
    while len(found) < options.top and not (found and time.monotonic() >= deadline):
        integer = program.build("loss", budgets, (*old, *found), options.diversity, barred)
        allowed = (a for a in ready if program.apart(a, (*old, *found), options.diversity))
        begun = next(allowed, None)
        start = None if begun is None else program.start(begun, integer)
        answer = solver.solve(integer, time_limit_s=max(deadline - time.monotonic(), 0.0), start=start)
        proof = proof or answer
        if answer.x is None:
            break
        found.append(program.read(answer.x))
    told = proof or answer
    return _Found(tuple(found), told.status, told.bound, told.solver or solver.name)


def _known(program: PathProgram, budgets: tuple[Budget, ...]) -> tuple[tuple[Assembly, ...], tuple[Assembly, ...]]:
    """Evaluated assemblies that stand for all their forms, and those of which another form may do.

    Another precision may bring into the budget what is over it, or save what failed (a loss of 1). Where the evaluated
    one fits, it was the best of its forms.
    """
    evaluated = program.learnt.losses
    fitting = set(program.ready(budgets))
    useful = {a: a in fitting and loss < 1 for a, loss in evaluated.items()}
    return tuple(a for a in useful if useful[a]), tuple(a for a in useful if not useful[a])


def _program(learnt: Learnt, options: Select) -> PathProgram:
    if options.latency_ms is not None and learnt.latency_ms is None:
        raise UsageError("--latency-ms needs a latency table: profile the zoo on a target first")
    if not 0 <= options.margin < 1:
        raise UsageError(f"the latency margin must be at least 0 and below 1, not {options.margin}")
    if options.top < 1 or options.diversity < 1:
        raise UsageError(f"top ({options.top}) and diversity ({options.diversity}) must be at least 1")
    if not learnt.graph.entering[None]:
        raise UsageError("no donor has a head that fits the task and could be built for the target")
    return PathProgram(learnt, options.margin)


def _failure(
    status: str, program: PathProgram, budgets: tuple[Budget, ...], solver: Solver, options: Select
) -> DercError:
    if status != "infeasible":
        limit = f"{options.time_limit_s:g} s"
        return DercError(f"{solver.name} found no assembly within {limit}: allow more time, or a larger budget")
    if not budgets:
        return InfeasibleError("no network can be put together from the blocks that could be built for the target")
    least = {budget: _least(program, budget, solver, options.time_limit_s) for budget in budgets}
    missed = {budget: reached for budget, reached in least.items() if not budget.met(reached[0])}
    together = " together" if not missed and len(budgets) > 1 else ""
    named = missed or least
    asked = " and ".join(f"{budget.option} {budget.limit:g}" for budget in named)
    best = "; ".join(
        f"the {budget.least} that is achievable is {amount:.4g} {budget.unit} ({assembly})"
        for budget, (amount, assembly) in named.items()
    )
    return InfeasibleError(f"no assembly of these donors meets {asked}{together}: {best}")


def _least(program: PathProgram, budget: Budget, solver: Solver, time_limit_s: float) -> tuple[float, str]:
    """The achievable amount of one resource nearest to its budget, without any budget, and the assembly that has it."""
    assembly, amount = _nearest(program, budget, solver, time_limit_s)
    if assembly is None:
        return budget.sign * inf, "none found in time"
    untried = budget.resource == "latency_ms" and assembly not in program.learnt.measured
    return amount, spans(assembly) + (", predicted" if untried else "")


def _nearest(
    program: PathProgram, budget: Budget, solver: Solver, time_limit_s: float
) -> tuple[Assembly | None, float]:
    if isinstance(solver, Exact):
        deadline = time.monotonic() + time_limit_s
        found = best(program, (), 1, resource=budget.resource, sign=budget.sign, deadline=deadline)
        return (found.assemblies[0], budget.sign * found.bound) if found.assemblies else (None, inf)
    answer = solver.solve(program.build(budget.resource, sign=budget.sign), time_limit_s=time_limit_s)
    return (None, inf) if answer.x is None else (program.read(answer.x), budget.sign * answer.objective)


def spans(assembly: Assembly) -> str:
    """The assembly with each donor's consecutive blocks as one span, such as ``resnet[0:5] | vit[3:9]``."""
    runs: list[list[str | int]] = []
    for block in assembly.blocks:
        if runs and runs[-1][0] == block.donor and runs[-1][2] == block.first:
            runs[-1][2] = block.last
        else:
            runs.append([block.donor, block.first, block.last])
    return " | ".join(f"{donor}[{first}:{last}]" for donor, first, last in runs)
