"""What the selection believes of loss and latency: priors from similarity and block timings, refitted to what was seen.

Both are sums over a path's edges. The loss is corrected by the model of `derc.surrogate`, on numbers that describe
blocks and stitches and on indicators of donors, blocks and pairs. What is known of a whole assembly replaces the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from derc.artifacts import Array, Assembly, CutId, CutZoo, EmbeddedZoo, Knowledge, LatencyTable
from derc.errors import DercError
from derc.layered import Edge, Layered
from derc.prediction import predict, wholes
from derc.surrogate import Group, Surrogate, fit, indicators

STITCH_LOSS = 0.01
"""Prior loss of a stitch between identical values."""
DISSIMILARITY_LOSS = 1.0
"""Prior loss of a stitch between values without any similarity."""
SIZE_LOSS = 0.1
"""Prior loss of the smallest donor over the largest where no accuracy is known; between them by log MACs."""
PRECISION_LOSS = 0.001
"""Prior loss of a block in a lower precision that changes nothing, so that float32 wins among equals."""
DISTORTION_LOSS = 1.0
"""Prior loss of a block of which a lower precision leaves nothing."""
UNKNOWN_DISTORTION = 0.05
"""Taken for a block whose lower precision was never compared with float32."""
SPREADS = {
    "level": 1.0,
    "prior": 1.0,
    "stitches": 0.7,
    "sizes": 0.3,
    "donor": 0.3,
    "donors": 0.3,
    "block": 0.5,
    "form": 0.5,
    "pair": 0.7,
}
"""Standard deviations of the corrections of the loss before anything was evaluated: of the level and of the prior's
share in units of the loss, of the others in units of its scale."""
NOISE_SPREAD = 0.2
"""The same of what no sum over edges explains."""


@dataclass(frozen=True)
class Learnt:
    """Predicted `loss` (1 − score) and `latency_ms` of each edge, and what is known of whole assemblies.

    `latency_ms` is None without a latency table. `measured` holds the median and the upper end of its interval, in ms.
    `loss` is the posterior mean of the `surrogate`, or one draw from it.
    """

    graph: Layered
    loss: Array
    latency_ms: Array | None
    losses: Mapping[Assembly, float]
    measured: Mapping[Assembly, tuple[float, float]]
    surrogate: Surrogate | None = None

    def draw(self, random: np.random.Generator) -> Learnt:
        """The same with losses of edges that are drawn from what is believed of them, where there is a surrogate."""
        return self if self.surrogate is None else replace(self, loss=self.surrogate.draw(random))

    def belief(self, assembly: Assembly) -> tuple[float, float]:
        """Posterior mean and standard deviation of an assembly's loss as a sum over its edges."""
        path = self._path(assembly)
        return float(self.loss[list(path)].sum()), self.surrogate.deviation(path) if self.surrogate else 0.0

    def expected_loss(self, assembly: Assembly) -> float:
        """The known loss of an assembly, else the predicted one."""
        known = self.losses.get(assembly)
        return float(self.loss[list(self._path(assembly))].sum()) if known is None else known

    def predict(self, assembly: Assembly) -> dict[str, float | None]:
        """`latency_ms` (None without a table), `params`, `macs` and `memory_mb`; a measured latency predicts itself.

        Raises DercError for an assembly that is not a path of the graph.
        """
        path = self._path(assembly)
        latency = None if self.latency_ms is None else float(self.latency_ms[list(path)].sum())
        if assembly in self.measured:
            latency = self.measured[assembly][0]
        return {"latency_ms": latency, **self.graph.costs(path)}

    def _path(self, assembly: Assembly) -> tuple[int, ...]:
        path = self.graph.path(assembly)
        if path is None:
            raise DercError(f"{assembly} is not an assembly of this partition")
        return path


def learn(
    graph: Layered, cuts: CutZoo, embedded: EmbeddedZoo, table: LatencyTable | None, knowledge: Knowledge
) -> Learnt:
    """Priors refitted to `knowledge`, where it is of this graph's assemblies; later entries replace earlier ones."""
    seen = [one for one in knowledge.evaluated if graph.path(one.assembly) is not None]
    scored = {one.assembly: 1 - one.score for one in seen if one.score is not None}
    losses = (_intact_losses(graph, embedded) if knowledge.accurate else {}) | scored
    known = (wholes(table, graph) if table else {}) | {one.assembly: one.latency for one in seen if one.latency}
    measured = {assembly: (latency.ms, latency.high_ms) for assembly, latency in known.items()}
    whole = {assembly: latency.ms for assembly, latency in known.items()}
    errors = {assembly.blocks[0].donor: loss for assembly, loss in losses.items() if assembly.intact}
    prior = prior_loss(graph, cuts, embedded, table.distortion if table else {}, errors)
    paths, values = [graph.path(assembly) or () for assembly in losses], np.array(list(losses.values()))
    telling = [not assembly.intact for assembly in losses]
    surrogate = fit(features(graph, cuts, embedded, prior), prior, paths, values, NOISE_SPREAD, telling)
    return Learnt(
        graph=graph,
        loss=surrogate.mean,
        latency_ms=predict(graph, cuts, table, whole).latency_ms if table else None,
        losses=losses,
        measured=measured,
        surrogate=surrogate,
    )


def _intact_losses(graph: Layered, embedded: EmbeddedZoo) -> dict[Assembly, float]:
    """What the donors of known accuracy lose, where they are assemblies of the graph."""
    known = {Assembly(chain): embedded.accuracy.get(name) for name, chain in graph.chains.items()}
    return {a: 1 - accuracy for a, accuracy in known.items() if accuracy is not None and graph.path(a) is not None}


def prior_loss(
    graph: Layered,
    cuts: CutZoo,
    embedded: EmbeddedZoo,
    distortion: Mapping[str, float] | None = None,
    errors: Mapping[str, float] | None = None,
) -> Array:
    """Loss of each edge before any assembly was evaluated.

    A block bears its MACs' share of its donor's error (`errors`, None: 1 − the known accuracies), in a lower precision
    the `distortion` of its output too (by `str(BlockRef)`), a stitch the dissimilarity of what it joins, and a step
    that leaves out equivalence sets their share of the network. Where the zoo knows the `parts` that blocks add to the
    score, a block loses what it adds less than the best one of its set, and a set that is left out the best of a set.
    """
    if embedded.parts:
        return _parted(graph, embedded.parts)
    known = {name: 1 - accuracy for name, accuracy in embedded.accuracy.items()} if errors is None else errors
    errors, total, own = _donor_errors(cuts, known), _total_macs(cuts), np.zeros(len(graph.blocks) + 1)
    for place, block in enumerate(graph.blocks):
        macs = sum(unit.macs for unit in cuts.donors[block.donor].units[block.first : block.last])
        own[place] = errors[block.donor] * macs / total[block.donor]
        if block.plain is not block:
            own[place] += PRECISION_LOSS + DISTORTION_LOSS * (distortion or {}).get(str(block), UNKNOWN_DISTORTION)
    loss: Array = graph.skipped / graph.sets + own[graph.head]
    stitched = np.flatnonzero(graph.stitch >= 0)
    loss[stitched] += STITCH_LOSS + DISSIMILARITY_LOSS * _unlike(graph, embedded, stitched)
    return loss


def _parted(graph: Layered, parts: Mapping[str, float]) -> Array:
    """Loss of each edge from what blocks add to the score."""
    adds = np.array([parts[str(block.plain)] for block in graph.blocks])
    at = np.array([block.set for block in graph.blocks])
    best = np.array([adds[at == place].max() if (at == place).any() else 0.0 for place in range(graph.sets)])
    lowered = np.array([PRECISION_LOSS * (block.plain is not block) for block in graph.blocks])
    own = np.append(best[at] - adds + lowered, 0.0)
    loss: Array = own[graph.head] + graph.skipped * best.mean()
    return loss


def _unlike(graph: Layered, embedded: EmbeddedZoo, stitched: Array) -> Array:
    """What each of the `stitched` edges is expected to lose; see `EmbeddedZoo.unlike`."""
    position = embedded.position
    given = np.array([position[CutId(block.donor, block.last)] for block in graph.blocks])[graph.tail[stitched]]
    taken = np.array([position[CutId(block.donor, block.first)] for block in graph.blocks])[graph.head[stitched]]
    pairs, inverse = np.unique(np.stack([given, taken]), axis=1, return_inverse=True)
    unlike: Array = np.array([embedded.unlike(int(one), int(other)) for one, other in pairs.T])
    return unlike[inverse.reshape(-1)]


def _total_macs(cuts: CutZoo) -> dict[str, int]:
    return {name: max(sum(unit.macs for unit in donor.units), 1) for name, donor in cuts.donors.items()}


def _donor_errors(cuts: CutZoo, known: Mapping[str, float]) -> dict[str, float]:
    """What each donor loses, where it is not `known` those donors' mean; without any, more for the smaller ones."""
    if known:
        mean = sum(known.values()) / len(known)
        return {name: known.get(name, mean) for name in cuts.donors}
    size = {name: float(np.log(macs)) for name, macs in _total_macs(cuts).items()}
    largest, spread = max(size.values()), max(max(size.values()) - min(size.values()), 1e-12)
    return {name: SIZE_LOSS * (largest - value) / spread for name, value in size.items()}


def features(graph: Layered, cuts: CutZoo, embedded: EmbeddedZoo, prior: Array) -> tuple[Group, ...]:
    """What corrections of the losses of a graph's edges may depend on; `prior` are the losses before.

    A block in a lower precision shares what is learnt of it in float32, and has a correction of its own besides.
    """
    edges = graph.edges
    plain = [edge.target and edge.target.plain for edge in edges]
    form = [None if edge.target is at_full else edge.target for edge, at_full in zip(edges, plain, strict=True)]
    steps = [edge.target and (edge.source and edge.source.plain, edge.target.plain) for edge in edges]
    return (
        Group("level", SPREADS["level"], values=np.array([[float(edge.source is None)] for edge in edges]), fixed=True),
        Group("prior", SPREADS["prior"], values=prior[:, None], fixed=True),
        Group("stitches", SPREADS["stitches"], values=_joints(graph, cuts, embedded)),
        Group("sizes", SPREADS["sizes"], values=_sizes(graph)),
        indicators("donor", SPREADS["donor"], [block and block.donor for block in plain]),
        indicators("donors", SPREADS["donors"], [_donors(edge) for edge in edges]),
        indicators("block", SPREADS["block"], plain),
        indicators("form", SPREADS["form"], form),
        indicators("pair", SPREADS["pair"], steps),
    )


def _joints(graph: Layered, cuts: CutZoo, embedded: EmbeddedZoo) -> Array:
    """(edges, 4) of stitches: 1, dissimilarity, log of the channels' ratio, and whether maps become tokens or back."""
    rows, position = np.zeros((len(graph.edges), 4)), embedded.position
    for place, edge in enumerate(graph.edges):
        if edge.stitch is not None and edge.source is not None and edge.target is not None:
            before, after = CutId(edge.source.donor, edge.source.last), CutId(edge.target.donor, edge.target.first)
            one, other = (cuts.donors[cut.donor].cuts[cut.cut].type for cut in (before, after))
            channels = float(np.log(other.channels / one.channels))
            unlike = embedded.unlike(position[before], position[after])
            rows[place] = 1.0, unlike, channels, one.layout is not other.layout
    return rows


def _sizes(graph: Layered) -> Array:
    """(edges, 2): standardised logarithms of the parameters and of the MACs of what the edges lead through."""
    inner = np.array([edge.target is not None for edge in graph.edges])
    logs = np.log1p(np.stack([graph.column("params"), graph.column("macs")], axis=1))
    if not inner.any():
        return np.zeros_like(logs)
    middle, spread = logs[inner].mean(axis=0), np.maximum(logs[inner].std(axis=0), 1e-9)
    found: Array = inner[:, None] * (logs - middle) / spread
    return found


def _donors(edge: Edge) -> tuple[str, str] | None:
    """The donors that a stitch joins."""
    if edge.stitch is None or edge.source is None or edge.target is None:
        return None
    return edge.source.donor, edge.target.donor


def margin_from(table: LatencyTable, quantile: float = 0.9) -> float:
    """Upper quantile of the shares by which latencies exceed their predictions, at least the A/A noise.

    The errors are those of the table's networks, each predicted from the others. In [0, 1), for the latency row
    (1 − margin) · budget.
    """
    excess = [-error for error in table.errors.values()]
    worst = float(np.quantile(excess, quantile, method="higher")) if excess else 0.0
    return max(worst, table.noise, 0.0)
