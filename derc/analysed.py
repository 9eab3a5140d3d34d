"""What is known of the donors before they are cut into blocks: graphs, cuts and units, similarities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from derc.ir import Graph, Value
from derc.stitching import Forms

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LoweredZoo:
    """The donors' graphs by donor name."""

    graphs: dict[str, Graph]


@dataclass(frozen=True)
class Unit:
    """What lies between two neighbouring cuts; costs for one image."""

    params: int
    macs: int
    bytes: int
    ops: int


@dataclass(frozen=True)
class CutDonor:
    """`cuts[0]` is the input, `cuts[-1]` the output; `units[i]` lies between `cuts[i]` and `cuts[i + 1]`."""

    cuts: tuple[Value, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class CutZoo:
    donors: dict[str, CutDonor]


@dataclass(frozen=True)
class CutId:
    """Cut number `cut` of a donor."""

    donor: str
    cut: int


@dataclass(frozen=True)
class StitchLosses:
    """What stitches will lose, known before any network is assembled; see `derc.stitchability`.

    `unexplained[a][b]` is the share of the variance of cut b that no stitch from cut a explains, and `agreement[b]` the
    share of images on which the donor's answer stays when its value at cut b is as a stitch would give it that leaves
    each of `levels` unexplained. Cuts are named by `name`. `forms[a][b]` is the form in
    which that share is left, where it is not the default.
    """

    levels: tuple[float, ...]
    unexplained: dict[str, dict[str, float]]
    agreement: dict[str, tuple[float, ...]]
    forms: Forms = field(default_factory=dict)

    @staticmethod
    def name(cut: CutId) -> str:
        """A cut's name here."""
        return f"{cut.donor}:{cut.cut}"

    @staticmethod
    def cut(name: str) -> CutId:
        """Inverse of `name`."""
        donor, _, cut = name.rpartition(":")
        return CutId(donor, int(cut))

    def loss(self, given: CutId, taken: CutId) -> float | None:
        """The share of images on which the donor of `taken` changes its answer behind a stitch, None: unknown."""
        left = self.unexplained.get(self.name(given), {}).get(self.name(taken))
        agreement = self.agreement.get(self.name(taken))
        if left is None or agreement is None:
            return None
        return 1 - float(np.interp(left, (0.0, *self.levels), (1.0, *agreement)))


@dataclass(frozen=True)
class BlockParts:
    """What each block, by `str(BlockRef)`, is expected to add to the objective's score; empty: not known."""

    parts: dict[str, float]


@dataclass(frozen=True)
class EmbeddedZoo:
    """Similarity of all pairs of cuts over the probe set.

    `similarity[a, b]` in [0, 1] (float64) belongs to `index[a]`, `index[b]`. Every cut of every donor is in the index,
    the input and the output too. `accuracy` is each task donor's own accuracy on the labelled probe set. `halves` (2,
    cuts, cuts) is the similarity over either half of the probe set, where it is known. A zoo of very many cuts has
    `rows` instead: `similarity` is then empty, and that of two cuts is the product of their rows of length 1.
    `stitches` is what stitches will lose, once that was looked at. `parts` says what each block (`str(BlockRef)`) adds
    to the objective's score, where the objective is one of which that is known.
    """

    index: tuple[CutId, ...]
    similarity: Array
    images: int
    estimator: str
    accuracy: dict[str, float] = field(default_factory=dict)
    halves: Array | None = None
    rows: Array | None = None
    stitches: StitchLosses | None = None
    parts: dict[str, float] = field(default_factory=dict)

    def unlike(self, given: int, taken: int) -> float:
        """What a stitch between two rows of the index is expected to lose, in [0, 1]: 1 − similarity if not known."""
        known = self.stitches.loss(self.index[given], self.index[taken]) if self.stitches else None
        return 1 - self.alike(given, taken) if known is None else known

    def alike(self, one: int, other: int) -> float:
        """Similarity of two rows of the index, in [0, 1]."""
        if self.rows is None:
            return float(self.similarity[one, other])
        return min(max(float(self.rows[one].astype(np.float64) @ self.rows[other]), 0.0), 1.0)

    @property
    def position(self) -> dict[CutId, int]:
        return {cut: row for row, cut in enumerate(self.index)}
