"""Donors with fewer units than there are equivalence sets: each unit is a block, and some sets have none of theirs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from derc.artifacts import Array, BlockRef, CutId, CutZoo, EmbeddedZoo
from derc.errors import UsageError


def split(cuts: CutZoo, blocks: int) -> tuple[CutZoo, CutZoo]:
    """The donors that can be cut into so many blocks, and those with fewer units.

    Raises UsageError where no donor has as many units, and for a donor of one unit, which cannot be first and last.
    """
    units = {name: len(donor.units) for name, donor in cuts.donors.items()}
    most = max(units, key=lambda name: units[name])
    lone = min(units, key=lambda name: units[name])
    if units[most] < blocks:
        raise UsageError(
            f"no donor can be split into {blocks} blocks, for {most} has the most units, {units[most]}: "
            f"use --blocks {units[most]} or fewer"
        )
    if units[lone] < min(blocks, 2):
        raise UsageError(
            f"donor {lone} is a single unit and cannot be split into {blocks} blocks: "
            "use --blocks 1, or leave this donor out of the zoo"
        )
    many = {name: donor for name, donor in cuts.donors.items() if units[name] >= blocks}
    few = {name: donor for name, donor in cuts.donors.items() if units[name] < blocks}
    return CutZoo(many), CutZoo(few)


def placed(
    few: CutZoo, embedded: EmbeddedZoo, others: Mapping[str, tuple[BlockRef, ...]]
) -> dict[str, tuple[BlockRef, ...]]:
    """A block of each unit, in rising sets, the first in the first set and the last in the last one.

    A cut between two blocks ends one set and begins another; the sum over a donor's cuts of how like both are to the
    cuts of the `others`, which have a block in every set, is the largest that there is.
    """
    return {name: _placed(name, len(donor.units), embedded, others) for name, donor in few.donors.items()}


def _placed(
    name: str, units: int, embedded: EmbeddedZoo, others: Mapping[str, tuple[BlockRef, ...]]
) -> tuple[BlockRef, ...]:
    """Dynamic program over cuts and the set of the block in front of each."""
    like = alike(name, units, embedded, others)
    sets = like.shape[1] + 1
    value, came = np.where(np.arange(sets) == 0, 0.0, -np.inf), list[Array]()
    for cut in range(units - 1):
        ending = value + np.append(like[cut], -np.inf)
        beginning = np.append(-np.inf, like[cut])
        steps = np.where(np.tri(sets, k=-1, dtype=bool), ending[None, :] + beginning[:, None], -np.inf)
        came.append(steps.argmax(axis=1))
        value = steps.max(axis=1)
    chosen = [sets - 1]
    for back in reversed(came):
        chosen.append(int(back[chosen[-1]]))
    return tuple(BlockRef(name, unit, unit + 1, place) for unit, place in enumerate(reversed(chosen)))


def alike(name: str, units: int, embedded: EmbeddedZoo, others: Mapping[str, tuple[BlockRef, ...]]) -> Array:
    """(units − 1, sets − 1): how like a donor's inner cuts are to all cuts between two sets, summed over the others."""
    position = embedded.position
    own = np.array([position[CutId(name, cut)] for cut in range(1, units)])
    chosen = np.array([[position[CutId(one, block.last)] for block in chain[:-1]] for one, chain in others.items()])
    if embedded.rows is not None:
        found: Array = embedded.rows[own].astype(np.float64) @ embedded.rows[chosen].sum(axis=0, dtype=np.float64).T
        return found
    both = embedded.similarity[np.ix_(own, chosen.reshape(-1))].astype(np.float64)
    total: Array = both.reshape(len(own), *chosen.shape).sum(axis=1)
    return total


def slack(cuts: CutZoo) -> dict[str, float]:
    """By how much the largest block of each donor exceeds an equal part of its multiply-accumulates."""
    found = {}
    for name, donor in cuts.donors.items():
        macs = [unit.macs for unit in donor.units]
        found[name] = max(macs) * len(macs) / max(sum(macs), 1) - 1
    return found
