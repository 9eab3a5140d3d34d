"""Which form a stitch takes: the cheapest of those that are expected to do as well as the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from derc.ir import TensorType
from derc.stitching import MAPS, REGRIDS, Form, common_grids, cost, obstacle

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


def forms(source: TensorType, target: TensorType) -> tuple[Form, ...]:
    """The forms that a stitch between two types may take, the default first.

    Bilinear regridding that halves each axis that shrinks is the mean and not looked at.
    """
    found = [Form(regrid, mapped) for mapped in MAPS for regrid in REGRIDS]
    pairs = zip(*common_grids(source, target), strict=True)
    halved = all(old == 2 * new for old, new in pairs if old > new)
    found = [form for form in found if not (halved and form.regrid == "bilinear")]
    return tuple(form for form in found if not obstacle(source, target, form))


def decided(
    source: TensorType,
    target: TensorType,
    left: Mapping[Form, float],
    levels: Sequence[float],
    agreement: Sequence[float],
    margin: float = MARGIN,
) -> Form:
    """The form of a stitch that leaves `left` unexplained in each.

    Of each kind of map, the regridding that leaves least, since they cost alike, but for what is `NEEDED`; of these the
    cheapest whose expected agreement, read off the tail donor's `agreement` at `levels` of what is unexplained, is at
    most `margin` below the best one's. What rises with the level, by chance, is taken to stay as it was.
    """
    best: dict[tuple[str, int], Form] = {}
    by_regrid = {form: (left[form] / NEEDED.get(form.regrid, 1.0), REGRIDS.index(form.regrid)) for form in left}
    for form in sorted(left, key=lambda form: by_regrid[form]):
        best.setdefault((form.map, form.rank), form)
    found = expected({form: left[form] for form in best.values()}, levels, agreement)
    good = [form for form, value in found.items() if value >= max(found.values()) - margin]
    return min(good, key=lambda form: (_price(source, target, form), left[form]))


def expected(left: Mapping[Form, float], levels: Sequence[float], agreement: Sequence[float]) -> dict[Form, float]:
    """The share of images on which the tail donor keeps its answer, by form; never more where more is left."""
    falling = np.minimum.accumulate((1.0, *agreement))
    return {form: float(np.interp(share, (0.0, *levels), falling)) for form, share in left.items()}


def _price(source: TensorType, target: TensorType, form: Form) -> tuple[int, int]:
    """What orders the forms of one stitch by how long they take: weights, then multiply-accumulates."""
    price = cost(source, target, form)
    return price.params, price.macs
