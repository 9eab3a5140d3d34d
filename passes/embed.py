"""embed: what every cut's value means, as similarities over the probe set (Kornblith et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from derc import similarity, streaming
from derc.artifacts import Array, CutId, CutZoo, EmbeddedZoo, digest
from derc.data import Split
from derc.errors import UsageError
from derc.ir import Layout, TensorType
from derc.judge import columns_of, correct
from derc.lowered import Lowered
from derc.pipeline import Context

LARGEST = 1e15
"""Products of larger activations might not fit float32."""
FORMS = ("auto", "full", "streamed", "sketched")


@dataclass(frozen=True)
class Embed:
    """One forward pass per donor over the probe set.

    `similarity` names the estimator (`derc.similarity.ESTIMATORS`). Features wider than `max_features` per image are
    pooled first; `pool` takes the mean over all positions instead. `form` is how the products of all pairs are made:
    `full` keeps each cut's kernel matrix over all images, `streamed` takes batches of 64 and keeps only the products,
    `sketched` keeps a short vector of each cut in place of the products. `auto` is full where that takes at most
    `memory_gb` (GiB), streamed for up to `dense` cuts, and sketched above.
    """

    similarity: str = "cka"
    pool: bool = False
    max_features: int = 65536
    batch: int = 64
    form: str = "auto"
    memory_gb: float = 4.0
    dense: int = 8192
    name: ClassVar[str] = "embed"
    produces: ClassVar[type] = EmbeddedZoo

    def inputs(self, context: Context) -> str:
        return digest([donor.digest() for donor in context.zoo.donors], context.data.probe.digest)

    def run(self, context: Context, cuts: CutZoo) -> EmbeddedZoo:
        """Raises UsageError for an unknown similarity, and where a donor's activations are not finite."""
        similarity.check(self.similarity)
        index = tuple(CutId(name, cut) for name, donor in cuts.donors.items() for cut in range(len(donor.cuts)))
        form = self.form_for(len(index), len(context.data.probe))
        maker = {"full": _full, "streamed": _streamed, "sketched": _sketched}[form]
        found, accuracy = maker(self, context, cuts, len(index))
        named = similarity.ESTIMATORS[self.similarity]
        estimator = named if form == "full" else f"{named.removesuffix(', debiased')}, unbiased, {form}"
        return EmbeddedZoo(
            index,
            found.similarity,
            len(context.data.probe),
            f"{estimator}, pooled" if self.pool else estimator,
            accuracy,
            halves=found.halves,
            rows=found.rows,
        )

    def form_for(self, cuts: int, images: int) -> str:
        """full, streamed or sketched, by the memory that a zoo of so many cuts and images takes."""
        if self.form not in FORMS:
            raise UsageError(f"unknown form of the similarity {self.form!r}, known: {', '.join(FORMS)}")
        if self.form != "auto":
            return self.form
        if cuts > self.dense:
            return "sketched"
        return "full" if full_bytes(cuts, images, self.similarity) <= self.memory_gb * 2**30 else "streamed"


@dataclass(frozen=True)
class _Found:
    similarity: Array
    halves: Array | None = None
    rows: Array | None = None


def full_bytes(cuts: int, images: int, estimator: str) -> int:
    """Memory of the full form: each cut's kernel matrix over all images and over both halves, float32 triangles."""
    return cuts * images**2 * (6 if estimator == "r2" else 3)


def _full(step: Embed, context: Context, cuts: CutZoo, count: int) -> tuple[_Found, dict[str, float]]:
    """One donor after another: all its cuts' kernel matrices over all images and over either half of them."""
    images = len(context.data.probe)
    parts = slice(0, images), slice(0, images // 2), slice(images // 2, images)
    collected = [similarity.Products(count, len(range(images)[part]), step.similarity) for part in parts]
    accuracy: dict[str, float] = {}
    for name in context.console.track(cuts.donors, "embed", len(cuts.donors)):
        rows: list[list[Array]] = [[] for _ in cuts.donors[name].cuts]
        logits = []
        for features, outputs in _batches(step, context, name, context.data.probe):
            for row, values in zip(rows, features, strict=True):
                row.append(values)
            logits.append(outputs)
        for row in rows:
            gram = similarity.kernel(np.concatenate(row), step.similarity)
            row.clear()
            for products, part in zip(collected, parts, strict=True):
                products.add(similarity.flatten(gram[part, part], step.similarity))
        _judge(accuracy, context, name, torch.cat(logits))
    whole, *halves = (products.similarity() for products in collected)
    return _Found(whole, np.stack(halves).astype(np.float32)), accuracy


def _streamed(step: Embed, context: Context, cuts: CutZoo, count: int) -> tuple[_Found, dict[str, float]]:
    """One batch after another through all donors."""
    streaming.refuse_regression(step.similarity)
    probe, logits = context.data.probe, {name: list[torch.Tensor]() for name in cuts.donors}
    bounds = streaming.bounds(len(probe))
    products = streaming.Streamed(count)
    for number, (first, last) in enumerate(context.console.track(bounds, "embed", len(bounds))):
        part, share = _part(probe, first, last), (last - first) / len(probe)
        vectors = []
        for name in cuts.donors:
            ((features, outputs),) = _batches(step, context, name, part)
            vectors.append(streaming.vectors(features, share, step.similarity))
            logits[name].append(outputs)
        products.add(np.concatenate(vectors), 2 * number // len(bounds))
    accuracy: dict[str, float] = {}
    for name, outputs_of in logits.items():
        _judge(accuracy, context, name, torch.cat(outputs_of))
    halves = products.similarity_of_halves() if len(bounds) > 1 else None
    return _Found(products.similarity(), halves), accuracy


def _sketched(step: Embed, context: Context, cuts: CutZoo, count: int) -> tuple[_Found, dict[str, float]]:
    """One donor after another, batch by batch into the columns of its cuts' rows."""
    streaming.refuse_regression(step.similarity)
    probe = context.data.probe
    bounds = streaming.bounds(len(probe))
    sketch = streaming.Sketched(len(bounds))
    rows, start = np.zeros((count, sketch.size), np.float32), 0
    accuracy: dict[str, float] = {}
    for name in context.console.track(cuts.donors, "embed", len(cuts.donors)):
        mine, logits = rows[start : start + len(cuts.donors[name].cuts)], []
        start += len(mine)
        for number, (first, last) in enumerate(bounds):
            ((features, outputs),) = _batches(step, context, name, _part(probe, first, last))
            vectors = streaming.vectors(features, (last - first) / len(probe), step.similarity)
            mine[:, sketch.columns[number] : sketch.columns[number + 1]] = sketch.project(vectors, number)
            logits.append(outputs)
        _judge(accuracy, context, name, torch.cat(logits))
    return _Found(np.zeros((0, 0)), rows=streaming.unit_rows(rows)), accuracy


def _part(split: Split, first: int, last: int) -> Split:
    return Split(split.images[first:last], None if split.labels is None else split.labels[first:last])


def _batches(step: Embed, context: Context, name: str, split: Split) -> Iterator[tuple[list[Array], torch.Tensor]]:
    """Each cut's features (n, p) and the logits, for at most `batch` images at a time."""
    lowered = context.lowered[name]
    for values in activations(lowered, split, step.batch):
        kinds = [cut.type for cut in lowered.cuts]
        features = [_features(value, kind, step) for value, kind in zip(values, kinds, strict=True)]
        if not all(np.abs(part).max(initial=0) <= LARGEST for part in features):
            raise UsageError(
                f"donor {name} gives NaN or infinite activations on the probe set, or above {LARGEST:g}: "
                "check its weights"
            )
        yield features, values[-1].clone()


@torch.no_grad()
def activations(lowered: Lowered, split: Split, batch: int) -> Iterator[list[torch.Tensor]]:
    """The values at all cuts, batch by batch."""
    units = [lowered.block(i, i + 1).eval() for i in range(len(lowered.units))]
    for images, _ in split.batches(batch):
        values = [images]
        for unit in units:
            values.append(unit(values[-1].clone()))
        yield values


def _features(value: torch.Tensor, kind: TensorType, step: Embed) -> Array:
    """(n, features); pooled over all positions if asked to, else maps are halved until they fit the limit."""
    if kind.spatial is not None and (step.pool or kind.numel > step.max_features):
        if kind.layout is Layout.NLC:
            value = value[:, kind.prefix :].unflatten(1, kind.spatial)
        value = value if kind.layout is Layout.NCHW else value.permute(0, 3, 1, 2)
        if step.pool:
            value = value.mean((2, 3))
        while value[0].numel() > step.max_features and min(value.shape[2:], default=1) > 1:
            value = F.avg_pool2d(value, 2)
    features: Array = value.flatten(1).float().clone().numpy()
    return features


def _judge(accuracy: dict[str, float], context: Context, name: str, logits: torch.Tensor) -> None:
    """Note the donor's accuracy on the probe set, where there are labels and its head fits them.

    Of a head that was fitted to these images it is that on images left out of the fit.
    """
    head = context.zoo[name].head
    right = correct(logits, context.data.probe, columns_of(context.zoo[name].labels, context.data))
    if right is not None:
        accuracy[name] = float(right.mean()) if head is None else head.accuracy
