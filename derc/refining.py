"""After a search: its best networks are matched without labels and scored again, and the better form is kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from derc.amounts import Amount
from derc.artifacts import Assembly, Matched, Scores, StitchedAssembly
from derc.evaluations import Rematch
from derc.matching import BEST, TAIL
from derc.passes.head import RefitHead
from derc.passes.match import Match
from derc.passes.score import Consult, Score
from derc.pipeline import execute
from derc.search import Judged, Search

FEW = 4
"""Networks that are matched after a search, and after each time that a network was too slow."""


def refine(search: Search, amount: Amount, teacher: str = TAIL, count: int = FEW) -> None:
    """Match the best `count` networks within the budgets that add something to their donors and are not matched yet.

    See `refine_these`.
    """
    waiting = [one for one in search.fitting(intact=False) if _waits(one)]
    best = sorted(waiting, key=lambda one: one.scores.value, reverse=True)[:count]
    refine_these(search, (one.assembly for one in best), amount, teacher)


def refine_these(search: Search, assemblies: Iterable[Assembly], amount: Amount, teacher: str = TAIL) -> None:
    """Match those evaluated networks that add something to their donors and are not matched yet, and log it.

    `teacher` is "tail", "best" or a donor's name. A network that scores worse than before stays as it was. What the
    search has learnt stays that of networks that are not matched, so that all its evaluations mean the same.
    """
    waiting = [one for one in map(search.judged.__getitem__, assemblies) if _waits(one)] if amount else []
    for one in search.context.console.track(waiting, "match", len(waiting)):
        matched, stitched, scores = _matched(search, one, amount, teacher)
        kept = scores.value >= one.scores.value
        better = replace(one, stitched=stitched, scores=scores, unmatched=one.scores) if kept else one
        search.judged[one.assembly] = replace(better, matched=matched)
        search.log.append(_line(search, one, matched, scores, kept=kept))


def _waits(one: Judged) -> bool:
    return one.matched is None and one.assembly.learns


def _matched(search: Search, one: Judged, amount: Amount, teacher: str) -> tuple[Matched, StitchedAssembly, Scores]:
    """What matching gives, the whole network with it, its head fitted anew where there is one, and its scores."""
    context, timings, assembly = search.context, search.timings, one.assembly
    step = Match(amount.images, amount.seconds, _teacher(search, assembly, teacher))
    plain = replace(one.stitched, assembly=assembly.plain, head=None)
    matched: Matched = execute(step, context, plain, timings=timings)
    stitched: StitchedAssembly = matched.stitched
    if context.zoo[assembly.blocks[-1].donor].head is not None:
        stitched = execute(RefitHead(), context, stitched, timings=timings)
    stitched = replace(stitched, assembly=assembly)
    scores = execute(Score(), context, stitched, execute(Consult(), context, timings=timings), timings=timings)
    return matched, stitched, scores


def _line(search: Search, before: Judged, matched: Matched, scores: Scores, *, kept: bool) -> Rematch:
    return Rematch(
        number=len(search.log) + 1,
        round=search.log[-1].round if search.log else 0,
        assembly=str(before.assembly),
        teacher=matched.teacher,
        images=matched.images,
        agreement_before=round(matched.before, 6),
        agreement=round(matched.after, 6),
        score_before=before.scores.value,
        score=scores.value,
        kept=kept,
        seconds=matched.seconds,
    )


def _teacher(search: Search, assembly: Assembly, teacher: str) -> str:
    """The name of the donor that the network learns from."""
    best = max((one for one in search.judged.values() if one.assembly.intact), key=lambda one: one.scores.value)
    name = best.assembly.blocks[0].donor if teacher == BEST else teacher
    return TAIL if name == assembly.blocks[-1].donor else name
