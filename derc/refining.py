"""After a search: its best networks are matched without labels and scored again, and the better form is kept."""

from __future__ import annotations

from dataclasses import replace

from derc.amounts import Amount
from derc.artifacts import Assembly, Matched, StitchedAssembly
from derc.passes.head import RefitHead
from derc.passes.match import TAIL, Match
from derc.passes.score import Consult, Score
from derc.pipeline import execute
from derc.search import Judged, Search

FEW = 4
"""Networks that are matched after a search, and after each time that a network was too slow."""


def refine(search: Search, amount: Amount, teacher: str = TAIL, count: int = FEW) -> None:
    """Match the best `count` networks within the budgets that add something to their donors and are not matched yet.

    `teacher` is "tail", "best" or a donor's name. A network that scores worse than before stays as it was. What the
    search has learnt stays that of networks that are not matched, so that all its evaluations mean the same.
    """
    if not amount:
        return
    waiting = [one for one in search.fitting(intact=False) if one.matched is None and any(one.assembly.stitched)]
    best = sorted(waiting, key=lambda one: one.scores.value, reverse=True)[:count]
    for one in search.context.console.track(best, "match", len(best)):
        search.judged[one.assembly] = _refined(search, one, amount, teacher)


def _refined(search: Search, one: Judged, amount: Amount, teacher: str) -> Judged:
    context, timings, assembly = search.context, search.timings, one.assembly
    step = Match(amount.images, amount.seconds, _teacher(search, assembly, teacher))
    plain = replace(one.stitched, assembly=assembly.plain, head=None)
    matched: Matched = execute(step, context, plain, timings=timings)
    stitched: StitchedAssembly = matched.stitched
    if context.zoo[assembly.blocks[-1].donor].head is not None:
        stitched = execute(RefitHead(), context, stitched, timings=timings)
    stitched = replace(stitched, assembly=assembly)
    scores = execute(Score(), context, stitched, execute(Consult(), context, timings=timings), timings=timings)
    if scores.value < one.scores.value:
        return replace(one, matched=matched)
    return replace(one, stitched=stitched, scores=scores, matched=matched, unmatched=one.scores)


def _teacher(search: Search, assembly: Assembly, teacher: str) -> str:
    """The name of the donor that the network learns from."""
    best = max((one for one in search.judged.values() if one.assembly.intact), key=lambda one: one.scores.value)
    name = best.assembly.blocks[0].donor if teacher == "best" else teacher
    return TAIL if name == assembly.blocks[-1].donor else name
