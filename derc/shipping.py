"""The closed loop: the best network is built and measured, and chosen again with that knowledge if it is too slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from derc.artifacts import Emitted, Latency, LatencyTable, Shipped
from derc.errors import InfeasibleError, ParityError, UnstableError
from derc.learnt import margin_from
from derc.passes.emit import Emit
from derc.passes.package import Package, check, coarsest, compare, outputs, plain_run, realised
from derc.passes.profile import intact_model
from derc.pipeline import Timings, execute
from derc.search import Judged, Search, best_of

LARGEST_MARGIN = 0.5
"""No prediction is distrusted more than this: what is built is measured anyway."""
BUSY = 1.1
"""A machine on which the anchor takes this many times its known latency is doing something else besides."""
PAUSES_S = (5.0, 10.0, 20.0, 20.0, 0.0)
"""How long a busy or restless machine is waited for after each attempt to measure one network."""
ATTEMPTS = 6
"""How many networks are built and measured before the compile gives up on the budget."""


@dataclass(frozen=True)
class Shipment:
    """The network that is shipped, of one engine's search; `met` is None where its latency is not measured."""

    search: Search
    chosen: Judged
    emitted: Emitted
    shipped: Shipped
    met: bool | None


def margin_of(table: LatencyTable) -> float:
    """The share of a latency budget that is kept free for the errors of predictions; at most LARGEST_MARGIN.

    Where blocks are predicted themselves, it is at least the median of how far their intervals reach up.
    """
    reach = [1 - latency.ms / latency.high_ms for latency in table.blocks.values() if latency.provenance == "predicted"]
    return min(max(margin_from(table), float(np.median(reach)) if reach else 0.0), LARGEST_MARGIN)


def ship(
    searches: Sequence[Search], measure_s: float, timings: Timings, refine: Callable[[Search], None] = lambda _: None
) -> Shipment:
    """Build and measure the best network; where it is over budget, select again with that knowledge, then `refine`.

    `measure_s` is what the profile may take; one network gets half of it. A network that the engine computes wrongly in
    a lower precision is passed over. Where the target is not here, the network that is predicted to be the best is
    shipped as it is. Raises InfeasibleError where none fits.
    """
    fastest: Shipment | None = None
    for _ in range(ATTEMPTS):
        found = best_of(searches)
        if found is None:
            break
        search, chosen = found
        emitted = execute(Emit(), search.context, chosen.stitched, timings=timings)
        if not search.context.target.present:
            return Shipment(search, chosen, emitted, _foreseen(search, chosen, emitted), None)
        try:
            shipped, budget = _measured(search, emitted, measure_s, timings), search.select.latency_ms
        except ParityError as error:
            if chosen.assembly.plain is chosen.assembly:
                raise
            search.refuse(chosen.assembly, str(error))
            continue
        search.record(chosen.assembly, shipped.latency)
        if budget is None or shipped.latency.high_ms <= budget:
            return Shipment(search, search.judged[chosen.assembly], emitted, shipped, True)
        search.context.console.say(
            f"{chosen.assembly} measured {shipped.latency.ms:.3f} ms, over {budget} ms: selecting again"
        )
        if fastest is None or shipped.latency.ms < fastest.shipped.latency.ms:
            fastest = Shipment(search, search.judged[chosen.assembly], emitted, shipped, False)
        with suppress(InfeasibleError):  # nothing more to propose: the fastest one that was built is the answer
            search.explore(search.select.top)
        refine(search)
    if fastest is None:
        raise InfeasibleError(f"no network fits the budgets: {_fastest(searches)}")
    return fastest


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
        vague = f"{latency.low_ms:.3f} to {latency.high_ms:.3f} ms do not tell whether {budget:g} ms are kept"
        busy = f"{name} now takes {slowdown:.2f} times what the table says"
        context.console.say(f"{busy if slowdown > BUSY else vague}: measuring again")
        time.sleep(pause)
    raise UnstableError(
        f"the latency did not settle: {latency.low_ms:.3f} to {latency.high_ms:.3f} ms for a budget of {budget:g} ms, "
        f"while {name} takes {slowdown:.2f} times its known latency; stop other work on this machine and try again, "
        "or measure the table anew after derc cache gc --all"
    )


def _foreseen(search: Search, chosen: Judged, emitted: Emitted) -> Shipped:
    """What can be said of a network whose device is not here: module and ONNX agree, and a latency that is no proof."""
    context, table = search.context, search.table
    images = next(iter(context.data.probe.batches(Package().more_images)))[0]
    module, plain = (
        outputs(realised(emitted), images),
        plain_run(emitted.onnx.tobytes(), context.target.batch, images.numpy()),
    )
    parity = compare(module, plain, plain, coarsest(emitted.precisions))
    check(parity)
    anchor = min(table.donors.values(), key=lambda latency: latency.ms)
    return Shipped(np.zeros(0, np.uint8), parity, latency_of(search, chosen), anchor, table.noise, {})


def latency_of(search: Search, chosen: Judged) -> Latency:
    """What is known of the whole network's latency, else the predicted one with what the margin says of it."""
    if chosen.measured is not None:
        return chosen.measured
    ms, margin = chosen.predicted["latency_ms"] or 0.0, margin_of(search.table)
    return Latency(ms, ms * (1 - margin), ms / (1 - margin), "predicted", 0, stable=False)


def _fastest(searches: Sequence[Search]) -> str:
    every = [item for search in searches for item in search.table.donors.items()]
    name, latency = min(every, key=lambda item: item[1].ms)
    return f"the fastest donor, {name}, takes {latency.ms:.3f} ms ({latency.provenance})"
