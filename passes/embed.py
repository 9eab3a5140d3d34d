"""embed: what every cut's value means, as similarities over the probe set (linear CKA, Kornblith et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from derc.artifacts import Array, CutId, CutZoo, EmbeddedZoo, digest
from derc.data import Split
from derc.errors import UsageError
from derc.ir import Layout, TensorType
from derc.judge import columns_of, correct
from derc.lowered import Lowered
from derc.pipeline import Context


@dataclass(frozen=True)
class Embed:
    """One forward pass per donor over the probe set; features wider than `max_features` per image are pooled first."""

    max_features: int = 65536
    batch: int = 64
    debiased: bool = False
    name: ClassVar[str] = "embed"
    produces: ClassVar[type] = EmbeddedZoo

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.probe.digest)

    def run(self, context: Context, cuts: CutZoo) -> EmbeddedZoo:
        index, grams = [], []
        accuracy: dict[str, float] = {}
        for name in context.console.track(cuts.donors, "embed", len(cuts.donors)):
            lowered = context.lowered[name]
            features, logits = self._features(lowered, context.data.probe)
            for cut, values in enumerate(features):
                index.append(CutId(name, cut))
                grams.append(self._gram(values, name))
            right = _correct(logits, context, name)
            if right is not None:
                accuracy[name] = right
        estimator = "linear CKA, debiased" if self.debiased else "linear CKA"
        return EmbeddedZoo(tuple(index), similarity(grams), len(context.data.probe), estimator, accuracy)

    def _features(self, lowered: Lowered, probe: Split) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each cut's value over the probe set as (n, features), and the logits."""
        rows: list[list[torch.Tensor]] = [[] for _ in lowered.cuts]
        for values in activations(lowered, probe, self.batch):
            for row, value, cut in zip(rows, values, lowered.cuts, strict=True):
                row.append(_flat(value, cut.type, self.max_features))
        return [torch.cat(row) for row in rows], torch.cat(rows[-1])

    def _gram(self, values: torch.Tensor, name: str) -> Array:
        gram = centred_gram(values, debiased=self.debiased)
        if not np.isfinite(gram).all():
            raise UsageError(f"donor {name} gives NaN or infinite activations on the probe set: check its weights")
        return gram


@torch.no_grad()
def activations(lowered: Lowered, split: Split, batch: int) -> Iterator[list[torch.Tensor]]:
    """The values at all cuts, batch by batch."""
    units = [lowered.block(i, i + 1).eval() for i in range(len(lowered.units))]
    for images, _ in split.batches(batch):
        values = [images]
        for unit in units:
            values.append(unit(values[-1].clone()))
        yield values


def _flat(value: torch.Tensor, kind: TensorType, limit: int) -> torch.Tensor:
    """(n, features); maps are halved by average pooling until they fit the limit."""
    if kind.spatial is not None and kind.numel > limit:
        if kind.layout is Layout.NLC:
            value = value[:, kind.prefix :].unflatten(1, kind.spatial)
        value = value if kind.layout is Layout.NCHW else value.permute(0, 3, 1, 2)
        while value[0].numel() > limit and min(value.shape[2:]) > 1:
            value = F.avg_pool2d(value, 2)
    return value.flatten(1).clone()


def centred_gram(values: torch.Tensor, *, debiased: bool = False) -> Array:
    """Centred (n, n) Gram matrix in float64, so that CKA is the cosine of two of them.

    Biased: HKH (Kornblith et al. 2019, eq. 3). Debiased: U-centred (Song et al. 2012, eq. 5).
    """
    values = values - values.mean(0)
    gram: Array = (values @ values.T).double().numpy()
    n = len(gram)
    if not debiased:
        gram = gram - gram.mean(0)
        centred: Array = gram - gram.mean(1, keepdims=True)
        return centred
    np.fill_diagonal(gram, 0.0)
    rows = gram.sum(0) / (n - 2)
    gram = gram - rows[:, None] - rows[None, :] + gram.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0.0)
    return gram


def similarity(grams: list[Array]) -> Array:
    """All pairwise CKAs by one product of flattened Grams, normalised by the product's own diagonal; in [0, 1]."""
    flat = np.stack([gram.ravel() for gram in grams])
    product = flat @ flat.T
    scale = np.sqrt(np.maximum(np.diag(product), 1e-300))
    result: Array = np.clip(product / scale[:, None] / scale[None, :], 0.0, 1.0)
    return result


def _correct(logits: torch.Tensor, context: Context, name: str) -> float | None:
    """Accuracy on the labelled probe set, or None without labels or where the head does not fit."""
    right = correct(logits, context.data.probe, columns_of(context.zoo[name].labels, context.data))
    return None if right is None else float(right.mean())
