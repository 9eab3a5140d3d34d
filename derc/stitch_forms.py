"""Which form a stitch takes: the cheapest of those that are expected to do as well as the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from derc.ir import TensorType
from derc.stitching import MAPS, PLAIN, REGRIDS, Form, common_grids, cost, obstacle

MARGIN = 0.005
"""Expected agreement that a cheaper form may cost, as a share of all images.

Agreement is interpolated between levels that were looked at on 64 images, so that it is known to a few per cent; but
two forms of one stitch are read off the same curve at shares that were measured on the same rows, so that their
difference is known far better than either. The margin is a third of one of those images.
"""
NEEDED = {"strided": 0.9, "bilinear": 0.8}
"""Of what the mean leaves unexplained, the share that a regridding may leave at most to take its place.

Networks whose stitches explain a little more with single positions are no better, or worse: a mean has less noise of
its own. Interpolation is an operator besides (docs/matching.md).
"""


LEAST_KEPT = 0.9
"""Share of images on which the tail donor must keep its answer behind a stitch that is no whole matrix.

What such a stitch leaves unexplained is nothing like noise: it is what the blocks that are left out would have done,
and networks answer otherwise for it than for as much noise. So it is tried out on the images that told the tolerance,
where it must keep what the best form is expected to keep, and nearly all.
"""


WIDE = 128
"""Channels on either side from which on maps through fewer directions are looked at.

A narrower map is over before a second operator has begun.
"""
SHARES = (8, 4)
"""Directions that are looked at: these parts of the narrower side's channels."""
LIGHTER = 0.5
"""Share of a whole matrix's products that such a map may take at most."""


def forms(source: TensorType, target: TensorType) -> tuple[Form, ...]:
    """The forms that a stitch between two types may take, the default first.

    Bilinear regridding that halves each axis that shrinks is the mean and not looked at.
    """
    found = [Form(regrid, mapped) for mapped in MAPS for regrid in REGRIDS]
    found += [Form(regrid, rank=rank) for rank in ranks(source.channels, target.channels) for regrid in REGRIDS]
    pairs = zip(*common_grids(source, target), strict=True)
    halved = all(old == 2 * new for old, new in pairs if old > new)
    found = [form for form in found if not (halved and form.regrid == "bilinear")]
    return tuple(form for form in found if not obstacle(source, target, form))


def ranks(channels: int, width: int) -> tuple[int, ...]:
    """The ranks of a map that are looked at; none of narrow ones, nor where a whole matrix takes hardly more."""
    least = min(channels, width)
    some = (least // share for share in SHARES if least >= WIDE)
    return tuple(rank for rank in some if rank * (channels + width) <= LIGHTER * channels * width)


def decided(
    source: TensorType,
    target: TensorType,
    left: Mapping[Form, float],
    levels: Sequence[float],
    agreement: Sequence[float],
    kept: Callable[[Form], float] = lambda _: 1.0,
    margin: float = MARGIN,
) -> Form:
    """The form of a stitch that leaves `left` unexplained in each.

    Of each kind of map, the regridding that leaves least, since they cost alike, but for what is `NEEDED`; of these the
    cheapest whose expected agreement, read off the tail donor's `agreement` at `levels` of what is unexplained, is at
    most `margin` below the best one's. One that is no whole matrix must really keep as many answers, as `kept` tells.
    """
    best: dict[tuple[str, int], Form] = {}
    by_regrid = {form: (left[form] / NEEDED.get(form.regrid, 1.0), REGRIDS.index(form.regrid)) for form in left}
    for form in sorted(left, key=lambda form: by_regrid[form]):
        best.setdefault((form.map, form.rank), form)
    found = expected({form: left[form] for form in best.values()}, levels, agreement)
    wanted = max(found.values()) - margin
    cheapest = sorted(found, key=lambda form: (_price(source, target, form), left[form]))
    good = (form for form in cheapest if found[form] >= wanted and not form.linear)
    return next((form for form in good if kept(form) >= max(wanted, LEAST_KEPT)), best[PLAIN.map, PLAIN.rank])


def expected(left: Mapping[Form, float], levels: Sequence[float], agreement: Sequence[float]) -> dict[Form, float]:
    """The share of images on which the tail donor keeps its answer, by form.

    What rises with the level, by chance, is taken to stay as it was.
    """
    falling = np.minimum.accumulate((1.0, *agreement))
    return {form: float(np.interp(share, (0.0, *levels), falling)) for form, share in left.items()}


def _price(source: TensorType, target: TensorType, form: Form) -> tuple[int, int]:
    """What orders the forms of one stitch by how long they take: weights, then multiply-accumulates."""
    price = cost(source, target, form)
    return price.params, price.macs
