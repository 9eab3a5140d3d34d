"""head: new last linear maps for labels that no donor knows, fitted in closed form to frozen features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import nn

from derc import fronts, heads, lastlayer, logistic
from derc.artifacts import Array, BlockRef, DonorHeads, FittedHead, StitchedAssembly, digest
from derc.assembled import live
from derc.data import Split
from derc.errors import DercError, UsageError
from derc.factories import naming
from derc.fronts import Step
from derc.heads import Rows
from derc.parts import parts
from derc.pipeline import Context

LARGEST = 2048
"""Labelled images that a head is fitted to at most: the probes, and others beyond the three splits."""
LOOKED_AT = 8
"""Images on which a donor's last map is looked for."""
IN_MEMORY = 2**25
"""Numbers that features in memory may be (256 MiB); beyond, ridge regression streams, and nothing else is tried."""


@dataclass(frozen=True)
class FitHeads:
    """Fits a head for the data's classes to the features of every donor that ends in a linear map."""

    images: int = LARGEST
    batch: int = 64
    name: ClassVar[str] = "head"
    produces: ClassVar[type] = DonorHeads

    def inputs(self, context: Context) -> str:
        images = context.data.training(self.images).digest
        return digest([donor.digest() for donor in context.zoo.donors], images, list(context.data.classes or ()))

    def run(self, context: Context) -> DonorHeads:
        """Raises UsageError where a donor's features are not finite."""
        split = context.data.training(self.images)
        found: dict[str, FittedHead] = {}
        for name in context.console.track(context.zoo.names, "heads", len(context.zoo.names)):
            lowered = context.lowered[name]
            path = lastlayer.find(lowered, next(iter(split.batches(LOOKED_AT)))[0])
            if path is not None:
                step = fronts.block(lowered, BlockRef(name, 0, len(lowered.units), 0))
                with naming(name):
                    found[name] = fitted(Featured(context, split, self.batch, (step,), path), logistic.STRENGTHS)
        return DonorHeads(found, tuple(name for name in context.zoo.names if name not in found))


@dataclass(frozen=True)
class RefitHead:
    """Fits the head of a stitched assembly to its own features, which are not quite those of the donor it ends in.

    As that donor's own head was fitted: logistic regression is tried where it was better there, with its strength.
    """

    images: int = LARGEST
    batch: int = 64
    name: ClassVar[str] = "refit"
    produces: ClassVar[type] = StitchedAssembly

    def inputs(self, context: Context) -> str:
        return FitHeads(self.images).inputs(context)

    def run(self, context: Context, stitched: StitchedAssembly) -> StitchedAssembly:
        """Raises DercError where the donor that the assembly ends in has no fitted head."""
        name = stitched.assembly.blocks[-1].donor
        own = context.zoo[name].head
        if own is None:
            raise DercError(f"donor {name} has no fitted head")
        split = context.data.training(self.images)
        rows = Featured(context, split, self.batch, steps(context, stitched), own.path)
        return replace(stitched, head=fitted(rows, (own.strength,) if own.method == "logistic" else ()))


def steps(context: Context, stitched: StitchedAssembly) -> tuple[Step, ...]:
    """The parts of a stitched assembly in order, the last one with its donor's head."""
    stitched = replace(stitched, assembly=stitched.assembly.plain, head=None)
    network, every = live(stitched, context.lowered), parts(stitched.assembly, context.lowered)
    found: list[Step] = []
    for part, module in zip(every, network.parts, strict=True):
        if isinstance(part.spec, BlockRef) and not stitched.buffers:
            found.append(fronts.block(context.lowered[part.spec.donor], part.spec))
        else:
            found.append(fronts.added(module))
    return tuple(found)


@dataclass(frozen=True)
class Featured:
    """A network of `steps` of which the last one ends in the map at `path`, with images to see its features on."""

    context: Context
    split: Split
    batch: int
    steps: Sequence[Step]
    path: str

    @property
    def classes(self) -> int:
        return len(self.context.data.classes or ())

    @property
    def module(self) -> nn.Module:
        """The map that the features go into."""
        return self.steps[-1].module.get_submodule(self.path)

    def __call__(self) -> Iterator[tuple[Array, Array]]:
        """What goes into that map (n, features) float64, and labels (n,); raises UsageError for NaN and infinity."""
        # Nothing may be taken from what is known behind the map, for then nothing flows into it.
        steps = [*self.steps[:-1], replace(self.steps[-1], key=("tapped", self.path, self.steps[-1].key), keep=False)]
        labels = np.split(labels_of(self.split), range(self.batch, len(self.split), self.batch))
        outputs = self.context.fronts.run(self.split, self.batch, steps)
        with lastlayer.tapped(self.module) as inputs:
            for part, _ in zip(labels, outputs, strict=True):
                features: Array = lastlayer.pooled(inputs.pop(), self.module).double().numpy()
                if not np.isfinite(features).all():
                    raise UsageError(
                        "the features before the last layer are not finite, so no head can be fitted: check the weights"
                    )
                yield features, part


def labels_of(split: Split) -> Array:
    """Raises UsageError where there are none."""
    if split.labels is None:
        raise UsageError("a head cannot be fitted without labels: give a folder for each class, or y in the npz file")
    return split.labels


def fitted(rows: Featured, strengths: tuple[float, ...]) -> FittedHead:
    """The best head for these features, logistic regression with one of `strengths` among the candidates."""
    labels = labels_of(rows.split)
    found = regress(rows, labels, rows.classes, lastlayer.width(rows.module), strengths)
    weight, bias = found.weight.T.astype(np.float32), found.bias.astype(np.float32)
    return FittedHead(rows.path, weight, bias, found.method, found.strength, len(labels), found.accuracy(labels))


def regress(rows: Rows, labels: Array, classes: int, width: int, strengths: tuple[float, ...]) -> heads.Linear:
    """In memory where the features fit there, else ridge regression that leaves out a batch at a time."""
    if len(labels) * width > IN_MEMORY:
        return heads.ridge(rows, classes)
    return heads.fit(np.concatenate([features for features, _ in rows()]), labels, classes, strengths)
