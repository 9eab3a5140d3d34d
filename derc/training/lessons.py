"""The lessons of an assembled network: which donors show what to which of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from derc.artifacts import BlockRef
from derc.errors import UsageError
from derc.lowered import Lowered
from derc.training.blockwise import InputOf, Lesson


@dataclass(frozen=True)
class Place:
    """One block of an emitted network, by its number there, and what of derc's own is in front of it: stem, stitch."""

    number: int
    spec: BlockRef
    before: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"block{self.number}"

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.before, self.name)


def chosen(places: Sequence[Place], asked: str = "") -> tuple[Place, ...]:
    """The blocks that are taught: those of the numbers asked for, ``1,3``, or all with something in front of them.

    Raises UsageError where there are none, and for a number that no block has.
    """
    if not asked:
        found = tuple(place for place in places if place.before)
        if not found:
            raise UsageError("--blockwise has nothing to teach, for this network has no stitch: leave it out")
        return found
    known = {str(place.number): place for place in places}
    numbers = [word.strip().removeprefix("block") for word in asked.split(",")]
    for number in numbers:
        if number not in known:
            raise UsageError(f"--blockwise-blocks: there is no block {number!r}, this network has {', '.join(known)}")
    return tuple(place for number, place in known.items() if number in numbers)


def lesson(
    places: Sequence[Place],
    place: Place,
    donors: Mapping[str, Lowered],
    head: tuple[str, str] | None = None,
    *,
    fits: bool = False,
) -> Lesson:
    """What one block is to give.

    `head` are the paths in the network and in the last block's donor of a last layer that was fitted to other labels,
    where it was: what goes into it is then compared, not the donor's answers. `fits` says whether the stitch in front
    is linear, so that it can be fitted in closed form.
    """
    donor = donors[place.spec.donor]
    wanted: nn.Module = donor.block(0, place.spec.last).eval()
    tap = None
    if head is not None and place.number == len(places) - 1:
        wanted, tap = InputOf(wanted, donor.attribute(head[1])), head[0]
    before = places[place.number - 1].spec if place.number else None
    given = None if before is None else donors[before.donor].block(0, before.last).eval()
    names = (place if before is None else places[place.number - 1]).spec.donor, place.spec.donor
    found = Lesson(place.name, place.parts, given, wanted, names, tap)
    if not (fits and given is not None and place.spec.first):
        return found
    return replace(found, stitch=place.before[-1], behind=donor.block(0, place.spec.first).eval())
