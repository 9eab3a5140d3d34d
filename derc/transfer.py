"""Labels that no donor knows: every donor gets a head that is fitted to them, before anything else looks at the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from derc.artifacts import DonorHeads, FittedHead
from derc.data import Data, Split
from derc.donor import Donor
from derc.errors import UsageError
from derc.passes.head import LARGEST, FitHeads
from derc.pipeline import Context, Timings, execute
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo

LEAST_IMAGES = 2
"""Of each class: one is fitted to while the other is left out."""


def with_heads(contexts: Sequence[Context], mode: str, timings: Timings) -> tuple[Context, ...]:
    """The contexts as they are where donors' own heads answer, else with a zoo of fitted heads.

    `mode` is auto (fitted where no donor's labels fit the data's), donor (never) or fit (always). Raises UsageError
    where no head fits or can be fitted.
    """
    context = contexts[0]
    data = context.data
    if data.classes is not None and len(data.classes) < 2:
        raise UsageError(
            f"the data have one class only, {data.classes[0]}: add images of another, or give data without labels"
        )
    if mode == "fit" and data.classes is None:
        raise UsageError("--head fit needs labels: give a folder for each class, or y in the npz file")
    known = data.task_donors(context.zoo)
    if mode == "donor" and not known:
        raise UsageError(
            "no donor's labels fit the data's classes: add a donor trained on them, fit a head with --head fit, or "
            "give data without labels"
        )
    if mode == "donor" or (mode == "auto" and known):
        return tuple(contexts)
    split = data.training(LARGEST)
    check_counts(split, data)
    found = execute(FitHeads(), context, timings=timings)
    if not found.heads:
        raise UsageError(
            f"no donor ends in a linear map ({', '.join(found.lacking)}), so no head can be fitted: add one that does"
        )
    tell(context, found, len(split), forced=mode == "fit")
    zoo = headed(context.zoo, found, data.classes or ())
    lowered = LiveDonors(zoo, NEGLIGIBLE)
    return tuple(replace(one, zoo=zoo, lowered=lowered) for one in contexts)


def check_counts(split: Split, data: Data) -> None:
    """Raise UsageError where a class has too few images to fit a head to."""
    counts = np.bincount(split.labels if split.labels is not None else [], minlength=len(data.classes or ()))
    for name, count in zip(data.classes or (), counts, strict=True):
        if count < LEAST_IMAGES:
            raise UsageError(
                f"class {name} has {count} of the {len(split)} images to fit a head to and needs {LEAST_IMAGES}: "
                "raise --probe, or add images of it"
            )


def headed(zoo: Zoo, found: DonorHeads, classes: tuple[str, ...]) -> Zoo:
    """The zoo with the fitted heads; a donor without one stays as it is."""
    return replace(zoo, donors=tuple(_headed(donor, found.heads.get(donor.name), classes) for donor in zoo.donors))


def _headed(donor: Donor, head: FittedHead | None, classes: tuple[str, ...]) -> Donor:
    return donor if head is None else replace(donor, head=head, labels=classes)


def tell(context: Context, found: DonorHeads, images: int, *, forced: bool) -> None:
    """Say that heads were fitted, to how many images, what that is worth, and what could not be."""
    why = "as --head fit asks" if forced else "because no donor's labels fit the data's"
    say = context.console.say
    say(f"heads for {', '.join(context.data.classes or ())} are fitted to {images} images, {why}")
    wide = [name for name, head in found.heads.items() if images < head.weight.shape[1]]
    if wide:
        say(f"{', '.join(wide)}: fewer images than features, so that the penalty decides: more images help")
    best = max(found.heads, key=lambda name: found.heads[name].accuracy)
    head = found.heads[best]
    say(f"best of them: {best}, {head.accuracy:.1%} on images left out of the fit ({head.method} regression)")
    if found.lacking:
        say(f"{', '.join(found.lacking)}: no linear map at the end to replace, so its own head stays")
