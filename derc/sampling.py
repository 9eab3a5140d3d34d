"""Assemblies drawn at random, to learn from whole networks what a sum of parts misses."""

from __future__ import annotations

from collections import Counter
from random import Random

from derc.artifacts import Assembly, BlockRef
from derc.layered import Layered
from derc.stitching import costs_nothing

DRAWS = 12
"""How many random assemblies each one that is taken is the best of."""


def sample(graph: Layered, count: int, seed: int, cheap: frozenset[str] = frozenset()) -> tuple[Assembly, ...]:
    """Up to `count` distinct stitched assemblies whose blocks are spread evenly over the graph's.

    Each is, of several drawn uniformly from all paths, the one with the least used blocks, then the one with the fewest
    stitch shapes that are neither in `cheap` nor in those taken before. Deterministic in `seed`.
    """
    random, ways = Random(seed), _ways(graph)
    used, shapes, taken = Counter[BlockRef](), set(cheap), dict[Assembly, None]()
    for _ in range(4 * count):
        drawn = [a for a in (_draw(graph, ways, random) for _ in range(DRAWS)) if not a.intact and a not in taken]
        if not drawn:
            continue
        best = min(
            drawn, key=lambda a: (sum(used[b] for b in a.blocks) / len(a.blocks), len(stitches(graph, a) - shapes))
        )
        taken[best] = None
        used.update(best.blocks)
        shapes |= stitches(graph, best)
        if len(taken) == count:
            break
    return tuple(taken)


def stitches(graph: Layered, assembly: Assembly) -> set[str]:
    """Shapes of the stitches of an assembly of the graph that do something."""
    edges = (graph.edges[place] for place in graph.path(assembly) or ())
    return {edge.stitch for edge in edges if edge.stitch is not None and not costs_nothing(edge.stitch)}


def _ways(graph: Layered) -> list[int]:
    """For each edge, the number of paths to the output that begin with it."""
    ways = [0] * len(graph.edges)
    by_depth = sorted(range(len(graph.edges)), key=lambda i: _set(graph.edges[i].source), reverse=True)
    for place in by_depth:
        target = graph.edges[place].target
        ways[place] = 1 if target is None else sum(ways[after] for after in graph.leaving[target])
    return ways


def _set(block: BlockRef | None) -> int:
    return -1 if block is None else block.set


def _draw(graph: Layered, ways: list[int], random: Random) -> Assembly:
    """One path, all equally likely."""
    places, stop = list[int](), None
    while True:
        after = graph.leaving[stop]
        (place,) = random.choices(after, [ways[edge] for edge in after])
        places.append(place)
        stop = graph.edges[place].target
        if stop is None:
            return graph.assembly(places)
