"""The compile: passes in order, then a search on each engine, then the bundle."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from derc import bundle
from derc.artifacts import CutZoo, EmbeddedZoo, LatencyTable, LoweredZoo, Partition
from derc.config import CompileSettings
from derc.console import Console
from derc.disturbances import check_quiet
from derc.donor import left_out
from derc.errors import InfeasibleError, OverBudgetError
from derc.measure import LEAST_LIMIT_S
from derc.outcome import Outcome
from derc.passes.adding import AddingParts
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed
from derc.passes.lower import Lower
from derc.passes.partition import PartitionZoo
from derc.passes.profile import Profile
from derc.passes.select import Select
from derc.passes.stitchable import Stitchable
from derc.pipeline import Context, Timings, execute
from derc.refining import refine
from derc.search import Search
from derc.shipping import margin_of, ship
from derc.summary import summarise
from derc.tables import span
from derc.tabling import foresee
from derc.transfer import with_heads
from derc.workspace import NEGLIGIBLE, open_contexts


@dataclass(frozen=True)
class Analysis:
    """The artifacts that do not depend on the budget."""

    lowered: LoweredZoo
    cuts: CutZoo
    embedded: EmbeddedZoo
    partition: Partition


def analyse(context: Context, settings: CompileSettings, timings: Timings) -> Analysis:
    """lower, cut, embed, partition, and what stitches between the blocks will lose, unless they may begin anywhere."""
    lowered = execute(Lower(), context, timings=timings)
    cuts = execute(CutDonors(), context, lowered, timings=timings)
    embed = Embed(similarity=settings.similarity, pool=settings.pool)
    embedded = execute(embed, context, cuts, timings=timings)
    step = PartitionZoo(blocks=settings.blocks, epsilon=settings.epsilon, exact=settings.exact, objective=settings.sets)
    partition = execute(step, context, cuts, embedded, timings=timings)
    if not settings.interval:
        stitches = execute(Stitchable(), context, cuts, partition, timings=timings)
        adding = execute(AddingParts(), context, partition, timings=timings)
        embedded = replace(embedded, stitches=stitches, parts=adding.parts)
        partition = replace(partition, forms=stitches.forms)
    return Analysis(lowered, cuts, embedded, partition)


def profile(context: Context, analysis: Analysis, settings: CompileSettings, timings: Timings) -> LatencyTable:
    """The latency table of the partition's blocks on the context's target.

    Raises UnstableError where its GPU is used by others or throttled.
    """
    check_quiet(context.target, context.console.say)
    return execute(Profile(limit_s=settings.profile_s), context, analysis.cuts, analysis.partition, timings=timings)


def tell_left_out(context: Context, *tables: LatencyTable) -> None:
    """Say, once, which donors have no block with a latency, and why."""
    known = {span(block)[0] for table in tables for block in table.blocks}
    for name in context.zoo.names:
        why = next((table.failed[name] for table in tables if name in table.failed), None)
        if name not in known and why is not None:
            context.console.say(left_out(name, why))


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the budget; `started` is on the clock of `time.perf_counter`."""

    contexts: tuple[Context, ...]
    heads: tuple[str, ...]
    analysis: Analysis
    tables: tuple[LatencyTable, ...]
    timings: Timings
    started: float


def prepare(settings: CompileSettings, console: Console) -> Prepared:
    """Open, analyse and profile everything; raises the errors of `derc.errors`."""
    started = time.perf_counter()
    contexts, timings = open_contexts(settings, console), Timings()
    timings.add("load", time.perf_counter() - started, reused=False)
    contexts = with_heads(contexts, settings.head, timings)
    context = contexts[0]
    heads = context.data.task_donors(context.zoo)
    analysis = analyse(context, settings, timings)
    tables = tuple(latencies(one, analysis, settings, timings) for one in contexts)
    tell_left_out(context, *tables)
    return Prepared(contexts, heads, analysis, tables, timings, started)


def compile_bundle(settings: CompileSettings, console: Console, command: str) -> dict[str, Any]:
    """Compile, write the bundle and return its manifest.

    Raises the errors of `derc.errors`; OverBudgetError after the bundle of the fastest network was written.
    """
    bundle.check_output(Path(settings.output))
    return complete(prepare(settings, console), settings, console, command)


def complete(prepared: Prepared, settings: CompileSettings, console: Console, command: str) -> dict[str, Any]:
    """Search, build and write the bundle for the budgets of `settings`; see `compile_bundle`."""
    timings = Timings(dict(prepared.timings.seconds), dict(prepared.timings.reused))
    searches = search_all(prepared, settings, timings)
    again = partial(refine, amount=settings.match_amount, teacher=settings.match_teacher)
    found = ship(searches, settings.profile_s or LEAST_LIMIT_S, timings, again)
    console.check()
    outcome = Outcome(
        settings,
        command,
        found.search.context,
        found.search,
        prepared.analysis.lowered,
        found.chosen,
        found.emitted,
        found.shipped,
        found.met,
        timings,
        NEGLIGIBLE,
    )
    manifest = summarise(outcome, prepared.started)
    if found.met is False:
        raise OverBudgetError(
            f"the network was built and measured at {found.shipped.latency.ms:.3f} ms, over the budget of "
            f"{settings.latency_ms} ms; the bundle is in {settings.output}: ask for a larger budget"
        )
    return manifest


def search_all(prepared: Prepared, settings: CompileSettings, timings: Timings) -> list[Search]:
    """A search on each engine, each with its own latencies; what one has evaluated the store gives to the next.

    Raises the first engine's InfeasibleError where none of them finds anything.
    """
    searches, refused = list[Search](), list[InfeasibleError]()
    for number in range(len(prepared.contexts)):
        search = open_search(prepared, settings, timings, number)
        try:
            search.run()
            refine(search, settings.match_amount, settings.match_teacher)
            searches.append(search)
        except InfeasibleError as error:
            refused.append(error)
    if not searches:
        raise refused[0]
    return searches


def open_search(prepared: Prepared, settings: CompileSettings, timings: Timings, number: int = 0) -> Search:
    """The search within the budgets of `settings` on one of the engines, not begun."""
    analysis, table = prepared.analysis, prepared.tables[number]
    select = Select(
        latency_ms=settings.latency_ms,
        params_m=settings.params_m,
        macs_g=settings.macs_g,
        memory_mb=settings.memory_mb,
        min_latency_ms=settings.min_latency_ms,
        min_params_m=settings.min_params_m,
        min_macs_g=settings.min_macs_g,
        max_blocks=settings.max_blocks,
        interval=settings.interval,
        top=settings.top,
        margin=margin_of(table) if settings.latency_ms or settings.min_latency_ms else 0.0,
        heads=prepared.heads,
    )
    return Search(
        prepared.contexts[number],
        select,
        analysis.cuts,
        analysis.embedded,
        analysis.partition,
        table,
        settings.evaluations,
        timings,
    )


def latencies(context: Context, analysis: Analysis, settings: CompileSettings, timings: Timings) -> LatencyTable:
    """Measured here, or of a device that is not here: recorded and predicted, and the console says which."""
    if context.target.present:
        return profile(context, analysis, settings, timings)
    start = time.perf_counter()
    found = foresee(context, analysis.cuts, analysis.partition, context.precisions)
    for note in found.notes:
        context.console.say(note)
    timings.add("foresee", time.perf_counter() - start, reused=False)
    return found.table
