"""The loop of select, stitch and score: candidates are evaluated, the program is refitted, the best is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import nan

from derc.artifacts import (
    Assembly,
    Candidate,
    Consensus,
    CutZoo,
    EmbeddedZoo,
    Evaluated,
    Knowledge,
    Latency,
    LatencyTable,
    Matched,
    Partition,
    Scores,
    Selection,
    StitchedAssembly,
)
from derc.deployed import differs
from derc.errors import DercError, InfeasibleError, MissingDependencyError
from derc.evaluations import DONOR, PRIOR, Entry, Line, kept_seconds
from derc.paired import chosen
from derc.parts import few, parts
from derc.passes.head import RefitHead
from derc.passes.recalibrate import Recalibrate
from derc.passes.score import Consult, Score
from derc.passes.select import Select
from derc.passes.stitch import FitStitches
from derc.pipeline import Context, Timings, execute
from derc.proposing import DESIGN, Proposal, Propose, greedy


@dataclass(frozen=True)
class Judged:
    """One evaluated assembly; `measured` is its whole network's latency where that is known.

    Where it was `matched` and is the better for it, `unmatched` are the scores before.
    """

    stitched: StitchedAssembly
    scores: Scores
    predicted: dict[str, float | None]
    measured: Latency | None = None
    matched: Matched | None = None
    unmatched: Scores | None = None

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
    log: list[Line] = field(default_factory=list)
    """Every evaluation in order, of donors and of what failed too, and what matching did to the best."""
    told_few: bool = False

    def run(self) -> None:
        """Evaluate until the evaluation budget is spent or nothing new is proposed.

        Raises InfeasibleError where neither an assembly nor an intact donor fits the budgets.
        """
        self._evaluate_intact()
        self.explore(min(DESIGN, self.evaluations))
        self.spend()

    def spend(self) -> None:
        """Evaluate one network after another until the evaluation budget is spent or nothing new is proposed."""
        while self.spent < self.evaluations and self.explore(1):
            pass

    @property
    def spent(self) -> int:
        """Assemblies other than intact donors evaluated so far."""
        return len(self.failed) + sum(not assembly.intact for assembly in self.judged)

    @property
    def knowledge(self) -> Knowledge:
        """What was evaluated; what failed is as good as nothing."""
        seen = (Evaluated(a, (j.unmatched or j.scores).value, j.measured) for a, j in self.judged.items())
        failed = (Evaluated(assembly, 0.0) for assembly in self.failed)
        return Knowledge((*seen, *failed), accurate=self.context.objective == "accuracy")

    def explore(self, most: int) -> int:
        """One round: solve, then stitch and score the new candidates, `most` at the most; returns how many were new.

        The first round's are the best before any assembly was evaluated. Later on, some are the best by the posterior
        mean, and the others the best by a draw from the posterior each; see `greedy`.
        """
        first, count = self.selection is None, min(most, self.select.top)
        number = self.log[-1].round + 1 if self.log else 1
        step = Propose(
            replace(self.select, fresh=not first),
            count=self.select.top if first else count,
            greedy=self.select.top if first else greedy(count, number),
            seed=self.context.seed,
            round=number,
        )
        zoo = self.cuts, self.embedded, self.partition, self.table, self.knowledge
        try:
            proposals = execute(step, self.context, *zoo, timings=self.timings)
        except InfeasibleError:
            if next(self.fitting(intact=True), None) is None:
                raise
            return 0
        self.selection = self.selection or proposals.selection
        fresh = [p for p in proposals.found if p.candidate.assembly not in {**self.judged, **self.failed}][:count]
        self._evaluate(fresh, step.round, first=first)
        return len(fresh)

    def _evaluate_intact(self) -> None:
        intact = {name: Assembly(self.partition.blocks[name]) for name in self.select.heads}
        for name, assembly in list(intact.items()):
            lacking = [str(block) for block in assembly.blocks if str(block) not in self.table.blocks]
            if lacking or name not in self.table.donors:
                why = self.table.failed.get(name) or f"{', '.join(lacking) or name} could not be built"
                if len(lacking) < len(assembly.blocks):  # else it is left out altogether, and said to be
                    self.context.console.say(f"donor {name} is no candidate as a whole: {why}")
                del intact[name]
        self._evaluate([Proposal(Candidate(assembly, 0.0, {}), DONOR, nan, nan) for assembly in intact.values()], 0)
        for name, assembly in intact.items():
            if assembly in self.judged and self.table.donors[name].provenance != "predicted":
                self.record(assembly, self.table.donors[name])

    def _evaluate(self, proposals: list[Proposal], number: int, *, first: bool = False) -> None:
        """Stitch and score what round `number` proposes, and log it."""
        if not proposals:
            return
        self._tell_few(proposals)
        reference, learnt = execute(Consult(), self.context, timings=self.timings), None
        for one in self.context.console.track(proposals, "stitch", len(proposals)):
            assembly = one.candidate.assembly
            started, watch = time.perf_counter(), self.timings.lap()
            stitched = replace(self._fitted(assembly.plain, reference, watch), assembly=assembly)
            try:
                scores = execute(Score(), self.context, stitched, reference, timings=watch)
            except DercError as error:
                if isinstance(error, MissingDependencyError) or not differs(self.context, assembly):
                    raise
                self.refuse(assembly, str(error))
                self._note(one, number, first=first, score=None, failed=str(error))
                continue
            finally:
                self.timings.include(watch)
            if not one.candidate.predicted and learnt is None:
                learnt = self.select.learn(self.cuts, self.embedded, self.partition, self.table, self.knowledge)
            predicted = one.candidate.predicted or (learnt.predict(assembly) if learnt else {})
            self.judged[assembly] = Judged(stitched, scores, predicted)
            seconds = kept_seconds(self.context.store, stitched, scores, time.perf_counter() - started, watch)
            self._note(one, number, first=first, score=scores.value, seconds=seconds)

    def _fitted(self, assembly: Assembly, reference: Consensus, watch: Timings) -> StitchedAssembly:
        """The network of an assembly in float32: stitches, batch norms and head of its own, as far as it needs them."""
        fitted = execute(FitStitches(), self.context, assembly, timings=watch)
        if assembly.intact and not self._known_answers:
            return fitted
        if sum(assembly.stitched) == 1:
            return self._headed(execute(Recalibrate(), self.context, fitted, reference, timings=watch), watch)
        if assembly.intact:
            found = execute(Recalibrate(), self.context, fitted, reference, timings=watch)
        else:
            found = execute(FitStitches(norms=True), self.context, assembly, timings=watch)
            fitted = self._headed(fitted, watch)
        if not any(found.buffers):
            return fitted
        found = self._headed(found, watch)
        new, old = (execute(Score(), self.context, one, reference, timings=watch) for one in (found, fitted))
        better = new.beats(old) if assembly.intact else new.accuracy > old.accuracy
        return found if better else fitted

    def _headed(self, stitched: StitchedAssembly, watch: Timings) -> StitchedAssembly:
        """With a head of its own where its last donor's was fitted."""
        if self.context.zoo[stitched.assembly.blocks[-1].donor].head is None:
            return stitched
        return execute(RefitHead(), self.context, stitched, timings=watch)

    @property
    def _known_answers(self) -> bool:
        """Whether validation images say what is right, and that is what counts."""
        return self.context.objective == "accuracy" and self.context.data.validation.labels is not None

    def _tell_few(self, proposals: list[Proposal]) -> None:
        """Say once that there are few images for what is now fitted."""
        every = [p for one in proposals for p in parts(one.candidate.assembly, self.cuts.donors)]
        told = few(every, len(self.context.data.probe))
        if told and not self.told_few:
            self.told_few = True
            self.context.console.say(told)

    def _note(
        self,
        one: Proposal,
        number: int,
        *,
        first: bool,
        score: float | None,
        seconds: float | None = None,
        failed: str | None = None,
    ) -> None:
        donor = one.by == DONOR
        entry = Entry(
            number=len(self.log) + 1,
            round=number,
            by=PRIOR if first else one.by,
            assembly=str(one.candidate.assembly),
            predicted=None if donor else round(1 - one.loss, 6),
            deviation=None if donor else round(one.deviation, 6),
            score=score,
            seconds=seconds,
            failed=failed,
        )
        self.log.append(entry)

    def refuse(self, assembly: Assembly, reason: str) -> None:
        """Leave an assembly out from now on."""
        self.context.console.say(f"{assembly} is left out: {reason}")
        self.judged.pop(assembly, None)
        self.failed[assembly] = reason

    def record(self, assembly: Assembly, latency: Latency) -> None:
        """Keep a whole-network measurement, which the next solve takes into account."""
        self.judged[assembly] = replace(self.judged[assembly], measured=latency)

    def admits(self, one: Judged) -> bool:
        """Whether the network meets all budgets but the upper one of latency."""
        if not self.select.large_enough(one.assembly, one.predicted):
            return False
        limits = {
            "params": self.select.params_m and self.select.params_m * 1e6,
            "macs": self.select.macs_g and self.select.macs_g * 1e9,
            "memory_mb": self.select.memory_mb,
        }
        for name, limit in limits.items():
            value = one.predicted[name]
            if limit is not None and value is not None and value > limit:
                return False
        return True

    def fits(self, one: Judged) -> bool:
        """Whether the network meets all budgets by what is known: measured latency before predicted."""
        if not self.admits(one):
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
    found = [(search, one) for search in searches for intact in (True, False) for one in search.fitting(intact=intact)]
    if not found:
        return None
    judged = [one for _, one in found]

    def beats(one: int, other: int) -> bool:
        return judged[one].scores.beats(judged[other].scores)

    return found[chosen([_rank(one) for one in judged], [one.assembly.intact for one in judged], beats)]


def _rank(one: Judged) -> tuple[float, float]:
    latency = one.measured.ms if one.measured else one.predicted["latency_ms"]
    return one.scores.value, -(latency or 0.0)
