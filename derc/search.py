"""The loop of select, stitch and score: candidates are evaluated, the program is refitted, the best is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from derc.artifacts import (
    Assembly,
    Candidate,
    CutZoo,
    EmbeddedZoo,
    Evaluated,
    Knowledge,
    Latency,
    LatencyTable,
    Partition,
    Scores,
    Selection,
    StitchedAssembly,
)
from derc.deployed import differs
from derc.errors import DercError, InfeasibleError, MissingDependencyError
from derc.passes.score import Consult, Score
from derc.passes.select import Select
from derc.passes.stitch import FitStitches
from derc.pipeline import Context, Timings, execute


@dataclass(frozen=True)
class Judged:
    """One evaluated assembly; `measured` is its whole network's latency where that is known."""

    stitched: StitchedAssembly
    scores: Scores
    predicted: dict[str, float | None]
    measured: Latency | None = None

    @property
    def assembly(self) -> Assembly:
        return self.stitched.assembly


@dataclass
class Search:
    """Evaluates intact donors first, then the selection's candidates, up to `evaluations` of them."""

    context: Context
    select: Select
    cuts: CutZoo
    embedded: EmbeddedZoo
    partition: Partition
    table: LatencyTable
    evaluations: int
    timings: Timings
    judged: dict[Assembly, Judged] = field(default_factory=dict)
    failed: dict[Assembly, str] = field(default_factory=dict)
    """Assemblies that the engine could not build, or not compute in their precisions, and why."""
    selection: Selection | None = None

    def run(self) -> None:
        """Evaluate until the evaluation budget is spent or nothing new is proposed.

        Raises InfeasibleError where neither an assembly nor an intact donor fits the budgets.
        """
        self._evaluate_intact()
        self.explore(self.evaluations)
        while self.spent < self.evaluations and self.explore(self.evaluations - self.spent):
            pass

    @property
    def spent(self) -> int:
        """Assemblies other than intact donors evaluated so far."""
        return len(self.failed) + sum(not assembly.intact for assembly in self.judged)

    @property
    def knowledge(self) -> Knowledge:
        """What was evaluated; what failed is as good as nothing."""
        seen = (Evaluated(a, j.scores.value, j.measured) for a, j in self.judged.items())
        return Knowledge((*seen, *(Evaluated(assembly, 0.0) for assembly in self.failed)))

    def explore(self, most: int) -> int:
        """One round: solve, then stitch and score the new candidates, `most` at the most; returns how many were new."""
        select = replace(self.select, fresh=self.selection is not None)
        try:
            selection = execute(
                select,
                self.context,
                self.cuts,
                self.embedded,
                self.partition,
                self.table,
                self.knowledge,
                timings=self.timings,
            )
        except InfeasibleError:
            if next(self.fitting(intact=True), None) is None:
                raise
            return 0
        self.selection = self.selection or selection
        fresh = [c for c in selection.candidates if c.assembly not in {**self.judged, **self.failed}][:most]
        self._evaluate(fresh)
        return len(fresh)

    def _evaluate_intact(self) -> None:
        intact = {name: Assembly(self.partition.blocks[name]) for name in self.select.heads}
        for name, assembly in list(intact.items()):
            lacking = [str(block) for block in assembly.blocks if str(block) not in self.table.blocks]
            if lacking or name not in self.table.donors:
                self.context.console.say(
                    f"donor {name} is no candidate as a whole: {', '.join(lacking) or name} could not be built"
                )
                del intact[name]
        self._evaluate([Candidate(assembly, 0.0, {}) for assembly in intact.values()])
        for name, assembly in intact.items():
            if assembly in self.judged and self.table.donors[name].provenance != "predicted":
                self.record(assembly, self.table.donors[name])

    def _evaluate(self, candidates: list[Candidate]) -> None:
        if not candidates:
            return
        reference = execute(Consult(), self.context, timings=self.timings)
        for candidate in self.context.console.track(candidates, "stitch", len(candidates)):
            assembly = candidate.assembly
            plain = execute(FitStitches(), self.context, assembly.plain, timings=self.timings)
            one = replace(plain, assembly=assembly)
            try:
                scores = execute(Score(), self.context, one, reference, timings=self.timings)
            except DercError as error:
                if isinstance(error, MissingDependencyError) or not differs(self.context, assembly):
                    raise
                self.refuse(assembly, str(error))
                continue
            predicted = candidate.predicted or self.select.predict(
                assembly, self.cuts, self.embedded, self.partition, self.table, self.knowledge
            )
            self.judged[assembly] = Judged(one, scores, predicted)

    def refuse(self, assembly: Assembly, reason: str) -> None:
        """Leave an assembly out from now on."""
        self.context.console.say(f"{assembly} is left out: {reason}")
        self.judged.pop(assembly, None)
        self.failed[assembly] = reason

    def record(self, assembly: Assembly, latency: Latency) -> None:
        """Keep a whole-network measurement, which the next solve takes into account."""
        self.judged[assembly] = replace(self.judged[assembly], measured=latency)

    def fits(self, one: Judged) -> bool:
        """Whether the network meets all budgets by what is known: measured latency before predicted."""
        limits = {
            "params": self.select.params_m and self.select.params_m * 1e6,
            "macs": self.select.macs_g and self.select.macs_g * 1e9,
            "memory_mb": self.select.memory_mb,
        }
        for name, limit in limits.items():
            value = one.predicted[name]
            if limit is not None and value is not None and value > limit:
                return False
        budget = self.select.latency_ms
        if budget is None:
            return True
        if one.measured is not None:
            return one.measured.high_ms <= budget
        latency = one.predicted["latency_ms"]
        return latency is not None and latency <= budget * (1 - self.select.margin)

    def fitting(self, *, intact: bool) -> Iterator[Judged]:
        """Evaluated networks within the budgets."""
        return (j for j in self.judged.values() if j.assembly.intact == intact and self.fits(j))

    def best_intact(self) -> Judged | None:
        """The best intact donor within the budgets, the faster one among equals; None where none fits."""
        return max(self.fitting(intact=True), key=_rank, default=None)

    def best(self) -> Judged | None:
        """The best network within the budgets, None where there is none; see `best_of`."""
        found = best_of([self])
        return found[1] if found else None


def best_of(searches: Sequence[Search]) -> tuple[Search, Judged] | None:
    """The best network within the budgets that any of the searches knows, and whose it is; None where there is none.

    An assembly replaces the best intact donor only if it answers significantly more images right: in a paired
    comparison its wins exceed its losses by one standard deviation of their difference.
    """
    donors = [(search, one) for search in searches if (one := search.best_intact()) is not None]
    donor = max(donors, key=lambda found: _rank(found[1]), default=None)
    others = [(search, one) for search in searches for one in search.fitting(intact=False)]
    for search, one in sorted(others, key=lambda found: _rank(found[1]), reverse=True):
        if donor is None or _better(one.scores, donor[1].scores):
            return search, one
    return donor


def _rank(one: Judged) -> tuple[float, float]:
    latency = one.measured.ms if one.measured else one.predicted["latency_ms"]
    return one.scores.value, -(latency or 0.0)


def _better(challenger: Scores, champion: Scores) -> bool:
    wins = int((challenger.correct & ~champion.correct).sum())
    losses = int((champion.correct & ~challenger.correct).sum())
    return bool(wins - losses > (wins + losses) ** 0.5)
