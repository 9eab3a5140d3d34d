"""The compile: passes in order, the search, and the closed loop of measuring what is shipped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derc import bundle
from derc.artifacts import CutZoo, EmbeddedZoo, Emitted, LatencyTable, LoweredZoo, Partition, Shipped
from derc.config import CompileSettings
from derc.console import Console
from derc.errors import InfeasibleError, OverBudgetError, UnstableError, UsageError
from derc.learnt import margin_from
from derc.measure import LEAST_LIMIT_S
from derc.outcome import Outcome
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed
from derc.passes.emit import Emit
from derc.passes.lower import Lower
from derc.passes.package import Package
from derc.passes.partition import PartitionZoo
from derc.passes.profile import Profile, intact_model
from derc.passes.select import Select
from derc.pipeline import Context, Timings, execute
from derc.search import Judged, Search
from derc.summary import summarise
from derc.workspace import NEGLIGIBLE, open_context

LARGEST_MARGIN = 0.5
"""No prediction is distrusted more than this: what is built is measured anyway."""
BUSY = 1.1
"""A machine on which the anchor takes this many times its known latency is doing something else besides."""
PAUSES_S = (5.0, 10.0, 20.0, 20.0, 0.0)
"""How long a busy machine is waited for after each attempt to measure one network."""
ATTEMPTS = 6
"""How many networks are built and measured before the compile gives up on the budget."""


@dataclass(frozen=True)
class Analysis:
    """The artifacts that do not depend on the budget."""

    lowered: LoweredZoo
    cuts: CutZoo
    embedded: EmbeddedZoo
    partition: Partition


def analyse(context: Context, settings: CompileSettings, timings: Timings) -> Analysis:
    """lower, cut, embed, partition."""
    lowered = execute(Lower(), context, timings=timings)
    cuts = execute(CutDonors(), context, lowered, timings=timings)
    embedded = execute(Embed(), context, cuts, timings=timings)
    partition = execute(
        PartitionZoo(blocks=settings.blocks, epsilon=settings.epsilon), context, cuts, embedded, timings=timings
    )
    return Analysis(lowered, cuts, embedded, partition)


def profile(context: Context, analysis: Analysis, settings: CompileSettings, timings: Timings) -> LatencyTable:
    """The latency table of the partition's blocks on the context's target."""
    return execute(Profile(limit_s=settings.profile_s), context, analysis.cuts, analysis.partition, timings=timings)


def compile_bundle(settings: CompileSettings, console: Console, command: str) -> dict[str, Any]:
    """Compile, write the bundle and return its manifest.

    Raises the errors of `derc.errors`; OverBudgetError after the bundle of the fastest network was written.
    """
    started = time.perf_counter()
    output = Path(settings.output)
    bundle.check_output(output)
    context = open_context(settings, console)
    heads = context.data.task_donors(context.zoo)
    if not heads:
        raise UsageError(
            "no donor's labels fit the data's classes: add a donor trained on them, or give data without labels"
        )
    timings = Timings()
    timings.add("load", time.perf_counter() - started, reused=False)
    analysis = analyse(context, settings, timings)
    table = profile(context, analysis, settings, timings)
    select = Select(
        latency_ms=settings.latency_ms,
        params_m=settings.params_m,
        macs_g=settings.macs_g,
        memory_mb=settings.memory_mb,
        top=settings.top,
        margin=min(margin_from(table), LARGEST_MARGIN) if settings.latency_ms else 0.0,
        heads=heads,
    )
    search = Search(
        context, select, analysis.cuts, analysis.embedded, analysis.partition, table, settings.evaluations, timings
    )
    search.run()
    chosen, emitted, shipped, met = ship(search, settings.profile_s or LEAST_LIMIT_S, timings)
    console.check()
    outcome = Outcome(
        settings, command, context, search, analysis.lowered, chosen, emitted, shipped, met, timings, NEGLIGIBLE
    )
    manifest = summarise(outcome, started)
    if not met:
        raise OverBudgetError(
            f"the network was built and measured at {shipped.latency.ms:.3f} ms, over the budget of "
            f"{settings.latency_ms} ms; the bundle is in {output}: ask for a larger budget"
        )
    return manifest


def ship(search: Search, measure_s: float, timings: Timings) -> tuple[Judged, Emitted, Shipped, bool]:
    """Build and measure the best network; where it is over budget, select again with that knowledge.

    `measure_s` is what the profile may take; one network gets half of it.
    """
    context, budget = search.context, search.select.latency_ms
    fastest: tuple[Judged, Emitted, Shipped] | None = None
    for _ in range(ATTEMPTS):
        chosen = search.best()
        if chosen is None:
            break
        emitted = execute(Emit(), context, chosen.stitched, timings=timings)
        shipped = _measured(search, emitted, measure_s, timings)
        search.record(chosen.assembly, shipped.latency)
        if budget is None or shipped.latency.high_ms <= budget:
            return search.judged[chosen.assembly], emitted, shipped, True
        context.console.say(
            f"{chosen.assembly} measured {shipped.latency.ms:.3f} ms, over {budget} ms: selecting again"
        )
        if fastest is None or shipped.latency.ms < fastest[2].latency.ms:
            fastest = search.judged[chosen.assembly], emitted, shipped
        search.explore(search.select.top)
    if fastest is None:
        raise InfeasibleError(f"no network fits the budgets: {_fastest(search)}")
    return *fastest, False


def _measured(search: Search, emitted: Emitted, measure_s: float, timings: Timings) -> Shipped:
    """Build, verify and measure beside the fastest donor.

    What comes out over budget is measured again while that donor is much slower than its table says, for then the
    machine is busy, or where the interval straddles the budget. Raises UnstableError where neither passes.
    """
    context, budget = search.context, search.select.latency_ms
    name, known = min(search.table.donors.items(), key=lambda item: item[1].ms)
    anchor = intact_model(context, name)
    for attempt, pause in enumerate(PAUSES_S):
        start = time.perf_counter()
        with context.console.status("package"):
            shipped = Package(limit_s=measure_s * (0.5 if attempt < 2 else 1.5)).run(context, emitted, anchor)
        timings.add("package", time.perf_counter() - start, reused=False)
        latency, slowdown = shipped.latency, shipped.anchor.ms / known.ms
        straddles = not latency.stable and budget is not None and latency.low_ms <= budget
        if budget is None or latency.high_ms <= budget or not (slowdown > BUSY or straddles):
            return shipped
        if slowdown > BUSY:
            context.console.say(f"{name} now takes {slowdown:.2f} times what the table says: measuring again")
            time.sleep(pause)
    raise UnstableError(
        f"the latency did not settle: {latency.low_ms:.3f} to {latency.high_ms:.3f} ms for a budget of {budget} ms, "
        f"while {name} takes {slowdown:.2f} times its known latency; stop other work on this machine and try again, "
        "or measure the table anew after derc cache gc --all"
    )


def _fastest(search: Search) -> str:
    name, latency = min(search.table.donors.items(), key=lambda item: item[1].ms)
    return f"the fastest donor, {name}, takes {latency.ms:.3f} ms"
