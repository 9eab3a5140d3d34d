"""What the selection believes of loss and latency: priors from similarity and block timings, refitted to what was seen.

Both are sums over a path's edges. Corrections come from Bayesian linear regression on indicators of each block, of each
edge and of being stitched, all with prior mean zero. What is known of a whole assembly replaces the sum.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from derc.artifacts import Array, Assembly, CutId, CutZoo, EmbeddedZoo, Knowledge, LatencyTable
from derc.errors import DercError
from derc.layered import Layered
from derc.prediction import predict, wholes

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
LOSS_SPREADS = (0.1, 0.05, 0.1, 0.01)
"""Prior standard deviations of the stitched, block and edge corrections of the loss, and the noise of a score."""


@dataclass(frozen=True)
class Learnt:
    """Predicted `loss` (1 − score) and `latency_ms` of each edge, and what is known of whole assemblies.

    `latency_ms` is None without a latency table. `measured` holds the median and the upper end of its interval, in ms.
    """

    graph: Layered
    loss: Array
    latency_ms: Array | None
    losses: Mapping[Assembly, float]
    measured: Mapping[Assembly, tuple[float, float]]

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
    losses = _intact_losses(graph, embedded) | {one.assembly: 1 - one.score for one in seen if one.score is not None}
    known = (wholes(table, graph) if table else {}) | {one.assembly: one.latency for one in seen if one.latency}
    measured = {assembly: (latency.ms, latency.high_ms) for assembly, latency in known.items()}
    whole = {assembly: latency.ms for assembly, latency in known.items()}
    loss = prior_loss(graph, cuts, embedded, table.distortion if table else {})
    return Learnt(
        graph=graph,
        loss=loss + corrections(graph, losses, loss, LOSS_SPREADS),
        latency_ms=predict(graph, cuts, table, whole).latency_ms if table else None,
        losses=losses,
        measured=measured,
    )


def _intact_losses(graph: Layered, embedded: EmbeddedZoo) -> dict[Assembly, float]:
    """What the donors of known accuracy lose, where they are assemblies of the graph."""
    known = {Assembly(chain): embedded.accuracy.get(name) for name, chain in graph.chains.items()}
    return {a: 1 - accuracy for a, accuracy in known.items() if accuracy is not None and graph.path(a) is not None}


def prior_loss(
    graph: Layered, cuts: CutZoo, embedded: EmbeddedZoo, distortion: Mapping[str, float] | None = None
) -> Array:
    """Loss of each edge before anything was evaluated.

    A block bears its MACs' share of its donor's error, in a lower precision the `distortion` of its output too (by
    `str(BlockRef)`), a stitch the dissimilarity of what it joins, and a step that leaves out equivalence sets their
    share of the network.
    """
    position, errors, total = embedded.position, _donor_errors(cuts, embedded), _total_macs(cuts)
    loss = np.zeros(len(graph.edges))
    for place, edge in enumerate(graph.edges):
        loss[place] = edge.skipped / graph.sets
        if edge.target is not None:
            donor, units = edge.target.donor, cuts.donors[edge.target.donor].units
            macs = sum(unit.macs for unit in units[edge.target.first : edge.target.last])
            loss[place] += errors[donor] * macs / total[donor]
            if edge.target.plain is not edge.target:
                changed = (distortion or {}).get(str(edge.target), UNKNOWN_DISTORTION)
                loss[place] += PRECISION_LOSS + DISTORTION_LOSS * changed
            if edge.stitch is not None and edge.source is not None:
                rows = position[CutId(edge.source.donor, edge.source.last)], position[CutId(donor, edge.target.first)]
                loss[place] += STITCH_LOSS + DISSIMILARITY_LOSS * (1 - embedded.alike(*rows))
    return loss


def _total_macs(cuts: CutZoo) -> dict[str, int]:
    return {name: max(sum(unit.macs for unit in donor.units), 1) for name, donor in cuts.donors.items()}


def _donor_errors(cuts: CutZoo, embedded: EmbeddedZoo) -> dict[str, float]:
    """1 − accuracy, the known donors' mean where it is not known; without any, a little more for the smaller ones."""
    known = embedded.accuracy
    if known:
        mean = sum(known.values()) / len(known)
        return {name: 1 - known.get(name, mean) for name in cuts.donors}
    size = {name: float(np.log(macs)) for name, macs in _total_macs(cuts).items()}
    largest, spread = max(size.values()), max(max(size.values()) - min(size.values()), 1e-12)
    return {name: SIZE_LOSS * (largest - value) / spread for name, value in size.items()}


def corrections(graph: Layered, known: Mapping[Assembly, float], predicted: Array, spreads: tuple[float, ...]) -> Array:
    """What to add to each edge's prediction so that sums over the `known` assemblies come near their values.

    `spreads` are the prior standard deviations of the corrections for being stitched, for each block and for each edge,
    and the noise of a value: the posterior mean of Gaussian linear regression. A block in a lower precision shares what
    is learnt of it in float32, and has one more correction, of the same spread, of its own.
    """
    paths = [(path, value) for a, value in known.items() if (path := graph.path(a)) is not None]
    if not paths:
        return np.zeros(len(graph.edges))
    taken = np.zeros((len(paths), len(graph.edges)))
    for row, (path, _) in enumerate(paths):
        taken[row, list(path)] = 1
    residual = np.array([value for _, value in paths]) - taken @ predicted
    covariance = _covariance(graph, taken, spreads)
    weights = np.linalg.solve(taken @ covariance.T + spreads[3] ** 2 * np.eye(len(paths)), residual)
    result: Array = weights @ covariance
    return result


def _covariance(graph: Layered, taken: Array, spreads: tuple[float, ...]) -> Array:
    """Prior covariance of each edge's correction with the sum over the edges marked in each row of `taken`."""
    stitched = np.array([edge.stitch is not None for edge in graph.edges], np.float64)
    targets = [edge.target for edge in graph.edges]
    plain = [target and target.plain for target in targets]
    inner = np.array([target is not None for target in targets])
    lower = np.array([target is not at_full for target, at_full in zip(targets, plain, strict=True)])
    sources = [edge.source and edge.source.plain for edge in graph.edges]
    shared, block, edge, _ = (spread**2 for spread in spreads)
    blocks = _count(plain, taken) + lower * _count(targets, taken)
    own = block * blocks + edge * _count(list(zip(sources, plain, strict=True)), taken)
    result: Array = shared * stitched * (taken @ stitched)[:, None] + inner * own
    return result


def _count(keys: Sequence[Hashable], taken: Array) -> Array:
    """For each edge (column), how many of the edges marked in each row of `taken` have its key."""
    number: dict[Hashable, int] = {}
    numbers = np.array([number.setdefault(key, len(number)) for key in keys])
    found: Array = np.stack([np.bincount(numbers, row, len(number)) for row in taken])[:, numbers]
    return found


def margin_from(table: LatencyTable, quantile: float = 0.9) -> float:
    """Upper quantile of the shares by which latencies exceed their predictions, at least the A/A noise.

    The errors are those of the table's networks, each predicted from the others. In [0, 1), for the latency row
    (1 − margin) · budget.
    """
    excess = [-error for error in table.errors.values()]
    worst = float(np.quantile(excess, quantile, method="higher")) if excess else 0.0
    return max(worst, table.noise, 0.0)
