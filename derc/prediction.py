"""What a whole network takes, predicted from what its parts take alone and corrected for what that sum misses.

Alone, each part starts a session, takes its input in the plain layout and gives its output so, and finds caches for
itself. T = Σ own + Σ joints: the corrections are linear in a few physical quantities and in indicators of blocks and
of edges, with Gaussian priors, and are fitted to networks that were measured whole (Bayesian linear regression; errors
left one out, Rasmussen & Williams 2006, eq. 5.12). They are a sum over a path's edges, as the selection needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from derc.artifacts import Array, Assembly, CutZoo, Latency, LatencyTable
from derc.errors import DercError
from derc.ir import Layout, TensorType
from derc.layered import Edge, Layered
from derc.stitching import costs_nothing

SCALE_SPREAD = 0.05
"""Prior standard deviation of how much all blocks together are off in a network, as a share."""
STITCH_SPREAD = 0.3
"""The same of all stitches."""
BLOCK_SPREAD = 0.03
"""The same of one block, beyond what all are."""
EDGE_SPREAD = 0.02
"""The same of one stitched joint, as a share of the block behind it."""
NOISE = 0.02
"""Standard deviation of what neither explains, as a share of the network's latency."""
LEAST_SHARE = 0.1
"""An edge's latency never falls below this share of its parts' own, whatever the corrections say."""


@dataclass(frozen=True)
class Prediction:
    """`latency_ms` of each edge of a graph, and `errors` of the known networks, each predicted from the others.

    An error is predicted ÷ measured − 1.
    """

    latency_ms: Array
    errors: dict[Assembly, float]


@dataclass(frozen=True)
class Parts:
    """What a graph's edges take alone, `own` (edges) in ms, and what may correct it, `features` (edges, features).

    Features: joints, MB handed over as maps and as tokens, ms of blocks and of stitches. `spreads` are the prior
    standard deviations of their coefficients, and `blocks` (edges) number the target blocks, −1 at the output.
    """

    own: Array
    features: Array
    spreads: Array
    blocks: Array
    stitched: Array


def predict(graph: Layered, cuts: CutZoo, table: LatencyTable, measured: Mapping[Assembly, float]) -> Prediction:
    """Latencies of all edges of `graph`, corrected by the networks `measured` whole (ms) that are paths of it.

    Raises DercError where the table lacks a block or a stitch of the graph.
    """
    parts = parts_of(graph, cuts, table)
    known = {a: ms for a, ms in measured.items() if graph.path(a) is not None}
    paths = [graph.path(assembly) or () for assembly in known]
    correction, errors = correct(parts, paths, np.array(list(known.values())))
    latency = np.maximum(parts.own + correction, LEAST_SHARE * parts.own)
    return Prediction(latency, dict(zip(known, map(float, errors), strict=True)))


def wholes(table: LatencyTable, graph: Layered) -> dict[Assembly, Latency]:
    """The networks that the table knows whole, where they are paths of `graph`: intact donors, then assemblies."""
    donors = {
        Assembly(chain): table.donors[name]
        for name, chain in graph.chains.items()
        if name in table.donors and table.donors[name].provenance != "predicted"
    }
    networks = {one.assembly: one.latency for one in table.networks if one.latency is not None}
    return {a: latency for a, latency in (donors | networks).items() if graph.path(a) is not None}


def correct(parts: Parts, paths: Sequence[Sequence[int]], whole: Array) -> tuple[Array, Array]:
    """Correction of each edge in ms, and the errors of networks `whole` (ms), each predicted from the others.

    `paths` are the edges of each network. Memory grows with the edges and with networks times blocks, not with edges
    times blocks.
    """
    if not len(whole):
        return np.zeros(len(parts.own)), np.zeros(0)
    used = np.unique(np.concatenate([np.asarray(path, np.int64) for path in paths]))
    taken = np.stack([np.isin(used, path) for path in paths]).astype(np.float64)
    common, block = parts.features * parts.spreads, BLOCK_SPREAD * parts.features[:, 3]
    own = np.where(parts.stitched, EDGE_SPREAD * parts.features[:, 3], 0.0)[used] ** 2
    shared, blocks = taken @ common[used], taken @ _by_block(parts, block, used)
    covariance = shared @ shared.T + blocks @ blocks.T + (taken * own) @ taken.T + np.diag((NOISE * whole) ** 2)
    inverse = np.linalg.inv(covariance)
    weights = inverse @ (whole - taken @ parts.own[used])
    errors: Array = -weights / np.diag(inverse) / whole
    correction: Array = common @ (shared.T @ weights)
    inner = parts.blocks >= 0
    correction[inner] += (block * (blocks.T @ weights)[parts.blocks])[inner]
    correction[used] += own * (taken.T @ weights)
    return correction, errors


def _by_block(parts: Parts, block: Array, used: Array) -> Array:
    """(used edges, blocks): the standard deviation of each edge's target block, in that block's column."""
    table = np.zeros((len(used), max(int(parts.blocks.max(initial=-1)) + 1, 1)))
    inner = np.flatnonzero(parts.blocks[used] >= 0)
    table[inner, parts.blocks[used][inner]] = block[used][inner]
    return table


def parts_of(graph: Layered, cuts: CutZoo, table: LatencyTable) -> Parts:
    """What the edges of `graph` take alone by `table`, and the features that correct it."""
    numbers = {target: i for i, target in enumerate(graph.blocks)}
    rows = np.zeros((len(graph.edges), 5))
    for place, edge in enumerate(graph.edges):
        for kind in _crossings(edge, cuts):
            rows[place, 0] += 1
            rows[place, 1 if kind.layout == Layout.NCHW else 2] += 4 * kind.numel / 1e6
        if edge.target is not None:
            rows[place, 3] = timed(table.blocks, str(edge.target), "block").ms
        if edge.stitch is not None and not costs_nothing(edge.stitch):
            rows[place, 4] = timed(table.stitches, edge.stitch, "stitch").ms
    return Parts(
        own=rows[:, 3] + rows[:, 4],
        features=rows,
        spreads=_spreads(rows),
        blocks=np.array([-1 if edge.target is None else numbers[edge.target] for edge in graph.edges]),
        stitched=np.array([edge.stitch is not None for edge in graph.edges]),
    )


def _crossings(edge: Edge, cuts: CutZoo) -> list[TensorType]:
    """Values that pass from part to part on an edge: two around a stitch that does something, one between blocks."""
    if edge.source is None or edge.target is None:
        return []
    source = cuts.donors[edge.source.donor].cuts[edge.source.last].type
    target = cuts.donors[edge.target.donor].cuts[edge.target.first].type
    return [source] if edge.stitch is None or costs_nothing(edge.stitch) else [source, target]


def _spreads(rows: Array) -> Array:
    """Priors in the device's own measure: a joint is worth about the fastest part, a MB handed over as in a stitch."""
    parts = rows[:, 3:][rows[:, 3:] > 0]
    fastest = float(parts.min(initial=np.inf)) if len(parts) else 0.0
    copied = rows[:, 1] + rows[:, 2]
    stitches = (rows[:, 4] > 0) & (copied > 0)
    rate = float(np.median(rows[stitches, 4] / copied[stitches])) if stitches.any() else fastest
    return np.array([fastest, rate, rate, SCALE_SPREAD, STITCH_SPREAD])


def timed(known: Mapping[str, Latency], name: str, kind: str) -> Latency:
    """The entry called `name`; raises DercError where there is none."""
    if name not in known:
        raise DercError(f"the latency table has no {kind} {name}: profile the zoo again with this partition")
    return known[name]
