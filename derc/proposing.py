"""What to evaluate next: the best networks by what is believed, and the best ones by draws from that belief."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from derc.artifacts import Candidate, CutZoo, EmbeddedZoo, Knowledge, LatencyTable, Partition, Selection, digest
from derc.evaluations import DRAW, MEAN
from derc.learnt import Learnt
from derc.passes.select import Select, select
from derc.pipeline import Context, code_version

TAKEN = 0.999
"""A loss of 1 is that of what failed, of which another form may do; what is proposed has not failed."""


DESIGN = 2
"""Networks that are evaluated before the first refit to any of them."""
EVERY = 4
"""Of the rounds after that, which evaluate one network each, every so many go by a draw, the others by the mean."""


def greedy(count: int, number: int) -> int:
    """How many of the `count` networks of round `number` go by the posterior mean."""
    return int(number % EVERY > 0) if count == 1 else (count + 1) // 2


@dataclass(frozen=True)
class Proposal:
    """A network to evaluate; `by` is what proposed it, `loss` and `deviation` what is believed of it."""

    candidate: Candidate
    by: str
    loss: float
    deviation: float


@dataclass(frozen=True)
class Proposals:
    """Distinct networks in the order in which they were found, and the `selection` of those by the mean, if any."""

    found: tuple[Proposal, ...]
    selection: Selection | None = None


@dataclass(frozen=True)
class Propose:
    """Proposes up to `count` networks within the budgets of `select`: `greedy` by the mean, then others by draws.

    Each is optimal for its losses among what is not proposed already, in whatever precisions; with `select.fresh`, and
    always by draws, among what was not evaluated either. Deterministic in `seed` and `round`; raises as `select` does.
    """

    select: Select
    count: int
    greedy: int
    seed: int = 0
    round: int = 0
    name: ClassVar[str] = "select"
    produces: ClassVar[type] = Proposals

    def inputs(self, context: Context) -> str:
        return digest([context.solver.name, code_version(Select.__module__)])

    def run(
        self,
        context: Context,
        cuts: CutZoo,
        embedded: EmbeddedZoo,
        partition: Partition,
        table: LatencyTable | None,
        knowledge: Knowledge,
    ) -> Proposals:
        learnt = self.select.learn(cuts, embedded, partition, table, knowledge)
        selection, found = None, list[Proposal]()
        if self.greedy:
            selection = select(learnt, replace(self.select, top=self.greedy), context.solver)
            found += [Proposal(one, MEAN, *learnt.belief(one.assembly)) for one in selection.candidates]
        found += self._drawn(learnt, found, context)
        return Proposals(tuple(found), selection)

    def _drawn(self, learnt: Learnt, found: list[Proposal], context: Context) -> list[Proposal]:
        """Up to `count` − `greedy` networks beside those `found`, each the best in a draw of its own."""
        random, options = np.random.default_rng((self.seed, self.round)), replace(self.select, fresh=True, top=1)
        drawn = list[Proposal]()
        while len(drawn) < self.count - self.greedy:
            taken = {one.candidate.assembly: min(one.loss, TAKEN) for one in (*found, *drawn)}
            losses = replace(learnt.draw(random), losses={**taken, **learnt.losses})
            best = select(losses, options, context.solver).candidates
            if not best:
                break
            drawn += [Proposal(one, DRAW, *learnt.belief(one.assembly)) for one in best]
        return drawn
