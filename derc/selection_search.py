"""The selection by derc's own search: the cheapest paths in order, from which the answers are taken one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import numpy as np

from derc.artifacts import Array, Assembly
from derc.dag import Dag, Limits
from derc.enumeration import Apart, Found
from derc.paths import Outcome, cheapest
from derc.selection_program import SLACK, Budget, PathProgram

CROWDED = 200
"""Paths turned down in one pass from which on the next leaves out what is too near to an answer."""
GROUPS = 256
"""Answers that a pass keeps apart from at most; the others are looked at afterwards."""


@dataclass(frozen=True)
class Answer:
    """The best assemblies, best first, of which the first `sure` are proved to be.

    `status` is that of the first one, as in `derc.milp.Solution`; nothing allowed costs less than `bound`.
    """

    assemblies: tuple[Assembly, ...]
    sure: int
    status: str
    bound: float


def best(
    program: PathProgram,
    budgets: tuple[Budget, ...],
    count: int,
    *,
    resource: str = "loss",
    sign: int = 1,
    diversity: int = 1,
    earlier: tuple[Assembly, ...] = (),
    barred: tuple[Assembly, ...] = (),
    deadline: float = inf,
) -> Answer:
    """The `count` assemblies of the least `resource` within `budgets` that `program.build` would give one by one.

    With `sign` −1 the largest. `deadline` is on the clock of `time.monotonic`.
    """
    if resource == "memory_mb":
        return _least_memory(program)
    chooser = _Chooser.of(program, budgets, count, sign * program.amounts(resource), diversity, earlier, barred)
    dag = dag_of(program, budgets, sign * program.amounts(resource))
    outcome = cheapest(dag, limits_of(budgets), count, chooser, apart=chooser.apart, deadline=deadline)
    return chooser.answer(outcome)


def dag_of(program: PathProgram, budgets: tuple[Budget, ...], cost: Array) -> Dag:
    """The graph of the blocks by depth; edges are named by their places in the layered graph."""
    graph, resources = program.learnt.graph, _resources(budgets)
    count = len(graph.blocks)
    levels, level = np.unique(graph.depth, return_inverse=True)
    order = np.argsort(level, kind="stable")
    node = np.empty(count + 2, int)
    node[order] = np.arange(1, count + 1)
    node[count], node[-1] = count + 1, 0
    tail, head = node[graph.tail], node[graph.head]
    names = np.lexsort((head, tail))
    amounts = np.array([program.amounts(r)[: graph.count] for r in resources]).reshape(len(resources), graph.count)
    return Dag(
        level=np.concatenate([[0], level[order] + 1, [len(levels) + 1]]),
        tail=tail[names],
        head=head[names],
        cost=cost[names],
        amounts=amounts[:, names],
        peak=program.peaks[names],
        names=names,
    )


def _resources(budgets: tuple[Budget, ...]) -> list[str]:
    return list(dict.fromkeys(budget.resource for budget in budgets))


def limits_of(budgets: tuple[Budget, ...]) -> Limits:
    """The budgets by resource; memory is that of all weights and the largest activation."""
    resources = _resources(budgets)
    lower, upper = np.full(len(resources), -inf), np.full(len(resources), inf)
    for budget in budgets:
        side = upper if budget.sign > 0 else lower
        side[resources.index(budget.resource)] = budget.limit
    return Limits(lower, upper, resources.index("memory_mb") if "memory_mb" in resources else -1, SLACK)


@dataclass
class _Chooser:
    """Takes answers in order of cost: known assemblies at their known costs, and paths of which nothing is known."""

    program: PathProgram
    count: int
    diversity: int
    ready: list[tuple[float, int]]
    """Cost and place in the amounts of each known assembly that may be chosen, cheapest first."""
    taken: set[tuple[int, ...]]
    """Paths of known assemblies."""
    before: list[frozenset[int]]
    """Blocks of the earlier assemblies that answers keep apart from."""
    sure: list[tuple[float, Assembly, frozenset[int]]] = field(default_factory=list)
    found: list[tuple[float, Assembly, frozenset[int]]] = field(default_factory=list)
    turned_down: int = 0

    @classmethod
    def of(
        cls,
        program: PathProgram,
        budgets: tuple[Budget, ...],
        count: int,
        cost: Array,
        diversity: int,
        earlier: tuple[Assembly, ...],
        barred: tuple[Assembly, ...],
    ) -> _Chooser:
        at = {assembly: place for place, assembly in enumerate(program.known, program.learnt.graph.count)}
        ready = sorted((float(cost[at[a]]), at[a]) for a in program.ready(budgets, barred))
        return cls(program, count, diversity, ready, set(program.paths), [program.members(a) for a in earlier])

    def __call__(self, found: Found, threshold: float) -> int:
        """The paths that cost at most `threshold`; where that is −inf, some of them, and nothing becomes certain."""
        certain, self.found = threshold > -inf, list(self.sure)
        self.turned_down = 0
        limit = threshold if certain else inf
        known = [one for one in self.ready if one[0] <= limit]
        place = 0
        for cost, row in zip(found.costs.tolist(), found.edges, strict=True):
            while place < len(known) and known[place][0] <= cost:
                place += self._offer_known(known[place])
            self._offer_path(cost, row)
            if len(self.found) >= self.count:
                break
        for one in known[place:]:
            self._offer_known(one)
        if certain:
            self.sure = self.found
        return len(self.found)

    def _offer_known(self, one: tuple[float, int]) -> int:
        assembly = self.program.known[one[1] - self.program.learnt.graph.count]
        self._offer(one[0], self.program.members(assembly), lambda: assembly)
        return 1

    def _offer_path(self, cost: float, row: Array) -> None:
        path = tuple(row[row >= 0].tolist())
        if path not in self.taken:
            graph = self.program.learnt.graph
            blocks = frozenset(graph.plain[graph.head[list(path[:-1])]].tolist())
            self._offer(cost, blocks, lambda: graph.assembly(path))

    def _offer(self, cost: float, blocks: frozenset[int], make: Callable[[], Assembly]) -> None:
        """One more answer, unless it is too near to one before or there are enough."""
        if len(self.found) >= self.count:
            return
        others = (*self.before, *(answer[2] for answer in self.found))
        if any(len(other & blocks) > max(len(other) - self.diversity, 0) for other in others):
            self.turned_down += 1
            return
        self.found.append((cost, make(), blocks))

    def apart(self) -> Apart | None:
        """What the next pass leaves out: whatever is too near to the earlier assemblies and the certain answers."""
        groups = [*self.before, *(answer[2] for answer in self.sure)][-GROUPS:]
        if self.turned_down < CROWDED or not groups:
            return None
        graph = self.program.learnt.graph
        entered = np.append(graph.plain, -1)[graph.head]
        member = np.array([np.isin(entered, list(group)) for group in groups], np.int16)
        return Apart(member, np.array([max(len(group) - self.diversity, 0) for group in groups], np.int16))

    def answer(self, outcome: Outcome) -> Answer:
        """What was found, and how far it is proved."""
        assemblies = tuple(assembly for _, assembly, _ in self.found)
        if self.sure:
            return Answer(assemblies, len(self.sure), "optimal", self.sure[0][0])
        if outcome.status == "time":
            return Answer(assemblies, 0, "feasible" if assemblies else "unknown", outcome.bound)
        return Answer((), 0, "infeasible", inf)


def _least_memory(program: PathProgram) -> Answer:
    """The assembly of the least weights and largest activation together.

    For each activation in turn the lightest path on which none is larger: its own largest one may be smaller, but then
    it was met before.
    """
    dag = dag_of(program, (), program.amounts("memory_mb"))
    least, best = inf, None
    floor = float(dag.from_nodes(dag.cost)[0]) if len(dag.tail) else inf
    for peak in np.unique(dag.peak).tolist():
        if peak + floor >= least:
            break
        below = dag.kept(dag.peak <= peak)
        onward = below.from_nodes(below.cost)
        if onward[0] + peak < least:
            least, best = float(onward[0]) + peak, below.names[below.path(below.cost, onward)]
    known = program.taken("memory_mb")[program.learnt.graph.count :]
    if len(known) and known.min() <= least:
        return Answer((program.known[int(np.argmin(known))],), 1, "optimal", float(known.min()))
    if best is None:
        return Answer((), 0, "infeasible", inf)
    return Answer((program.learnt.graph.assembly(best),), 1, "optimal", least)
