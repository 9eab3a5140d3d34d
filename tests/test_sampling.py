"""Random assemblies: legal, distinct, all paths alike, blocks spread evenly."""

from __future__ import annotations

from collections import Counter
from random import Random

from derc import sampling
from derc.passes.select import Select
from derc.sampling import sample, stitches
from tests.layers import paths, random_problem


def test_every_path_is_equally_likely() -> None:
    learnt = random_problem(0, (4, 4)).learn(Select())
    every, ways, random = list(paths(learnt)), sampling._ways(learnt.graph), Random(0)
    assert sum(ways[edge] for edge in learnt.graph.leaving[None]) == len(every)
    counts = Counter(sampling._draw(learnt.graph, ways, random) for _ in range(200 * len(every)))
    assert set(counts) == set(every)
    assert max(counts.values()) < 300 and min(counts.values()) > 120


def test_samples_are_stitched_distinct_and_spread() -> None:
    graph = random_problem(1, (6, 6, 6, 6)).learn(Select()).graph
    taken = sample(graph, 24, 0)
    assert len(set(taken)) == 24 and not any(a.intact for a in taken)
    assert all(graph.path(a) for a in taken)
    counts = Counter(block for a in taken for block in a.blocks)
    assert set(counts) == set(graph.blocks) and max(counts.values()) <= 4 * min(counts.values())
    assert taken == sample(graph, 24, 0) != sample(graph, 24, 1)


def test_cheap_shapes_are_preferred() -> None:
    graph = random_problem(2, (6, 6, 6, 6)).learn(Select()).graph
    every = frozenset(edge.stitch for edge in graph.edges if edge.stitch)
    cheap = frozenset(sorted(every)[::2])
    new = {
        names - cheap
        for given in (cheap, every)
        for names in [frozenset().union(*(stitches(graph, a) for a in sample(graph, 8, 0, given)))]
    }
    assert len(new) == 2


def test_a_small_graph_gives_what_it_has() -> None:
    learnt = random_problem(3, (3, 3), blocks=2).learn(Select())
    stitched = [a for a in paths(learnt) if not a.intact]
    assert set(sample(learnt.graph, 50, 0)) == set(stitched)
