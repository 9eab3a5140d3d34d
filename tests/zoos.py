"""Small random zoos, as artifacts, for the tests of partition and selection."""

from __future__ import annotations

import numpy as np

from derc.artifacts import CutDonor, CutId, CutZoo, EmbeddedZoo, Latency, LatencyTable, Unit
from derc.ir import Layout, TensorType, Value


def random_cuts(seed: int, sizes: tuple[int, ...], *, pooled: bool = False) -> CutZoo:
    """Donors d0, d1, … of these numbers of units, every second with tokens; `pooled` puts an NC cut before the head."""
    random = np.random.default_rng(seed)
    donors = {}
    for number, units in enumerate(sizes):
        types = [TensorType((3, 32, 32), Layout.NCHW)]
        for cut in range(1, units):
            channels, side = int(random.integers(4, 33)), int(random.choice([8, 4]))
            if number % 2:
                types.append(TensorType((side * side + 1, channels), Layout.NLC, "float32", 1, (side, side)))
            else:
                types.append(TensorType((channels, side, side), Layout.NCHW))
            if pooled and cut == units - 1:
                types[-1] = TensorType((channels,), Layout.NC)
        types.append(TensorType((10,), Layout.NC))
        costs = random.integers(1, 2000, (units, 3))
        donors[f"d{number}"] = CutDonor(
            tuple(Value(f"v{i}", kind) for i, kind in enumerate(types)),
            tuple(Unit(params=int(p), macs=1000 * int(m), bytes=100 * int(b), ops=1) for p, m, b in costs),
        )
    return CutZoo(donors)


def random_embedded(seed: int, cuts: CutZoo, *, accuracy: bool = True) -> EmbeddedZoo:
    """Similarities of random features with a drift along depth, so that neighbouring cuts are alike."""
    random = np.random.default_rng(seed + 1)
    index = tuple(CutId(name, i) for name, donor in cuts.donors.items() for i in range(len(donor.cuts)))
    depth = np.array([i / (len(donor.cuts) - 1) for donor in cuts.donors.values() for i in range(len(donor.cuts))])
    noise = random.random((len(index), len(index)))
    similarity = 0.7 * np.exp(-4 * np.abs(depth[:, None] - depth)) + 0.15 * (noise + noise.T)
    np.fill_diagonal(similarity, 1.0)
    known = {name: float(random.uniform(0.6, 0.99)) for name in cuts.donors} if accuracy else {}
    return EmbeddedZoo(index, similarity, 64, "test", known)


def latency(ms: float, provenance: str = "measured") -> Latency:
    return Latency(ms, 0.99 * ms, 1.01 * ms, provenance, 30)


def table_of(donors: dict[str, float], blocks: dict[str, float], stitches: dict[str, float]) -> LatencyTable:
    """A latency table of plain milliseconds."""
    rows = ({name: latency(ms) for name, ms in part.items()} for part in (donors, blocks, stitches))
    return LatencyTable("cpu", {}, *rows, noise=0.02)
