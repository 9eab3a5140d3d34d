"""What is compared at a budget: derc's best assembly and the best intact donor, and the paper's choice by NASWOT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.accuracy_networks import paper_net
from benchmarks.accuracy_world import Row, World
from benchmarks.published_search import Space, Trace, published
from benchmarks.search_values import order
from derc.amounts import Amount
from derc.artifacts import Assembly, Knowledge, StitchedAssembly, decode, digest, encode
from derc.compiler import open_search
from derc.config import CompileSettings
from derc.errors import InfeasibleError
from derc.layered import Layered
from derc.passes.select import spans
from derc.pipeline import Timings
from derc.refining import refine
from derc.scoring.codes import Naswot, naswot
from derc.search import Judged, Search
from derc.shipping import margin_of

INTACT = "intact"
"""The state in which a compile gives a donor, beside the stages of an assembly."""


@dataclass(frozen=True)
class Choice:
    """The networks of a seed's budget, None where there is none; `row` is all that is known of the choice."""

    donor: str
    best: str
    assembly: Assembly | None
    paper: Assembly | None
    row: Row


def choose(world: World, seed: int, budget: float) -> Choice | None:
    """derc's search and the paper's within a budget, from the work folder where they ran before; None: nothing fits."""
    key = f"choice-{seed}-{budget:g}"
    found = world.work.row(key, lambda: searched(world, seed, budget))
    if "donor" not in found:
        return None
    paper = world.work.row(f"paper-{seed}-{budget:g}", lambda: published_choice(world, seed, budget))
    row = paper | found | {"paper_seconds": paper["seconds"]}
    return Choice(found["donor"], found["best"], read(found["assembly"]), read(paper["paper"]), row)


def read(text: str | None) -> Assembly | None:
    return None if text is None else decode(Assembly, text, {})


def short(assembly: Assembly) -> str:
    """A name for files."""
    return digest(assembly)[:12]


def searched(world: World, seed: int, budget: float) -> Row:
    """What a compile would return, as compiled and after matching, and the best assembly that is no intact donor."""
    settings = CompileSettings(seed=seed, latency_ms=budget, evaluations=world.size.evaluations)
    search = open_search(world.prepared(seed), settings, Timings())
    try:
        search.run()
    except InfeasibleError:
        return {}
    donor, answer = search.best_intact(), search.best()
    if donor is None or answer is None:
        return {}
    every = [one for one in search.judged.values() if one.assembly.intact]
    best = max(every, key=lambda one: one.scores.value)
    for one in (donor, best):
        keep(world, seed, INTACT, one.stitched)
    compiled = {one.assembly: one for one in search.fitting(intact=False)}
    refine(search, Amount(images=world.size.train), count=world.size.matched)
    matched = search.best()
    assert matched is not None
    found = {
        "donor": donor.assembly.blocks[0].donor,
        "donor_ms": world.table.donors[donor.assembly.blocks[0].donor].ms,
        "best": best.assembly.blocks[0].donor,
        "answer": spans(answer.assembly),
        "answer_intact": answer.assembly.intact,
        "matched_answer": spans(matched.assembly),
        "matched_answer_intact": matched.assembly.intact,
        "evaluated": search.spent,
        "assembly": None,
    }
    return found | told(world, seed, search, compiled)


def told(world: World, seed: int, search: Search, compiled: Mapping[Assembly, Judged]) -> Row:
    """The best assembly after matching, of those that were matched; its two states go to the work folder."""
    pool = [one for one in search.fitting(intact=False) if one.matched is not None]
    if not pool:
        return {}
    best = max(pool, key=lambda one: one.scores.value)
    assert best.matched is not None
    keep(world, seed, "stage1", compiled[best.assembly].stitched)
    keep(world, seed, "stage2", best.stitched)
    return {
        "assembly": encode(best.assembly)[0],
        "name": spans(best.assembly),
        "tail": best.assembly.blocks[-1].donor,
        "assembly_ms": best.predicted["latency_ms"],
        "first_by_score": best.assembly == max(compiled.values(), key=lambda one: one.scores.value).assembly,
        "agreement": [best.matched.before, best.matched.after],
        "match_images": best.matched.images,
        "match_seconds": best.matched.seconds,
    }


def keep(world: World, seed: int, stage: str, stitched: StitchedAssembly) -> None:
    world.work.artifact(f"{seed}-{short(stitched.assembly)}-{stage}", StitchedAssembly, lambda: stitched)


def kept(world: World, seed: int, stage: str, assembly: Assembly) -> StitchedAssembly:
    """A state of an assembly that its choice put into the work folder."""
    key = f"{seed}-{short(assembly)}-{stage}"
    return world.work.artifact(key, StitchedAssembly, lambda: missing(key))


def missing(key: str) -> StitchedAssembly:
    raise FileNotFoundError(f"{key} is missing from the work folder: remove its choices and run again")


@cache
def spaces(world: World, seed: int) -> tuple[Layered, dict[Assembly, float]]:
    """All assemblies with one block of each equivalence set, but no intact donor, and their predicted latencies."""
    search = open_search(world.prepared(seed), CompileSettings(seed=seed, latency_ms=world.slowest), Timings())
    analysis, table = world.coarse or (world.analysis, world.table)
    select = replace(search.select, one_per_set=True)
    learnt = select.learn(analysis.cuts, analysis.embedded, analysis.partition, table, Knowledge())
    assert learnt.latency_ms is not None
    found = {one: learnt.predict(one)["latency_ms"] for one in order(learnt.graph) if not one.intact}
    return learnt.graph, {one: ms / (1 - margin_of(table)) for one, ms in found.items() if ms is not None}


def published_choice(world: World, seed: int, budget: float) -> Row:
    """The published loop's best network by NASWOT within the budget; stem, stitches and head are random."""
    graph, latencies = spaces(world, seed)
    allowed = tuple(one for one, ms in latencies.items() if ms <= budget)
    if not allowed:
        return {"paper": None, "paper_name": None}
    options, probe = Naswot(), world.context(seed).data.probe

    def value(assembly: Assembly) -> float:
        def make() -> Row:
            net = paper_net(assembly, world.lowered, world.fresh, seed)
            return {"naswot": naswot(net.network, probe, options.images, options.batch)}

        return float(world.work.row(f"{seed}-{short(assembly)}-naswot", make)["naswot"])

    trace = Trace(value, world.size.swaps)
    published(Space(graph, allowed), trace, seed)
    best = max(trace.seen, key=lambda one: trace.seen[one])
    return {
        "paper": encode(best)[0],
        "paper_name": spans(best),
        "paper_ms": latencies[best],
        "paper_naswot": trace.seen[best],
        "paper_seen": len(trace.seen),
        "paper_allowed": len(allowed),
    }
