"""Which blocks may follow which, and the stitches between them, for all pairs of many blocks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from derc import stitching
from derc.artifacts import Array, BlockRef, CutId, CutZoo, StitchLosses
from derc.ir import TensorType
from derc.stitching import PLAIN, Form

NONE: Mapping[str, Mapping[str, Form]] = {}


@dataclass(frozen=True, eq=False)
class Ends:
    """Where blocks end and begin: `donor`, `first`, `last`, and what they take and give as numbers of `types`.

    `form[stop, start]` numbers, in `forms`, the form of a stitch between two places; `stop` and `start` (blocks) number
    those where blocks end and begin.
    """

    donor: Array
    first: Array
    last: Array
    takes: Array
    gives: Array
    types: tuple[TensorType, ...]
    stop: Array
    start: Array
    form: Array
    forms: tuple[Form, ...]

    @classmethod
    def of(cls, cuts: CutZoo, blocks: Sequence[BlockRef], forms: Mapping[str, Mapping[str, Form]] = NONE) -> Ends:
        """The ends of `blocks`; `forms` are those of stitches by the names of their cuts, the default elsewhere."""
        donors = {name: number for number, name in enumerate(cuts.donors)}
        types: dict[TensorType, int] = {}
        kinds = {
            name: [types.setdefault(cut.type, len(types)) for cut in donor.cuts] for name, donor in cuts.donors.items()
        }
        rows = [(donors[b.donor], b.first, b.last, kinds[b.donor][b.first], kinds[b.donor][b.last]) for b in blocks]
        donor, first, last, takes, gives = np.array(rows, int).reshape(len(rows), 5).T
        stops, starts = dict[str, int](), dict[str, int]()
        stop = [stops.setdefault(StitchLosses.name(CutId(b.donor, b.last)), len(stops)) for b in blocks]
        start = [starts.setdefault(StitchLosses.name(CutId(b.donor, b.first)), len(starts)) for b in blocks]
        numbers, table = {PLAIN: 0}, np.zeros((len(stops), len(starts)), np.int32)
        for one in stops.keys() & forms.keys():
            for other in starts.keys() & forms[one].keys():
                table[stops[one], starts[other]] = numbers.setdefault(forms[one][other], len(numbers))
        ends = np.array(stop, int), np.array(start, int), table
        return cls(donor, first, last, takes, gives, tuple(types), *ends, tuple(numbers))

    @cached_property
    def joined(self) -> Array:
        """Whether the column's block is what its donor goes on with after the row's, (blocks, blocks)."""
        onward: Array = (self.donor[:, None] == self.donor[None, :]) & (self.last[:, None] == self.first[None, :])
        return onward

    @cached_property
    def legal(self) -> Array:
        """Whether a stitch leads from the row's block to the column's without making up places, (blocks, blocks)."""
        given, taken = np.unique(self.gives), np.unique(self.takes)
        table = np.zeros((len(self.types), len(self.types)), bool)
        for one in given:
            for other in taken:
                table[one, other] = stitching.keeps_places(self.types[one], self.types[other])
        return table[self.gives[:, None], self.takes[None, :]]

    def stitches(self, tail: Array, head: Array) -> tuple[Array, tuple[str, ...], Array]:
        """For stitched edges between blocks: numbers of their shapes, the shapes' keys, and params, macs and bytes.

        Numbers are (edges), costs (shapes, 3).
        """
        form = self.form[self.stop[tail], self.start[head]].astype(int)
        pair = (form * len(self.types) + self.gives[tail]) * len(self.types) + self.takes[head]
        shapes, inverse = np.unique(pair, return_inverse=True)
        keys, numbers, costs = dict[str, int](), list[int](), list[tuple[int, int, int]]()
        for shape in shapes.tolist():
            rest, other = divmod(shape, len(self.types))
            number, one = divmod(rest, len(self.types))
            ends = self.types[one], self.types[other], self.forms[number]
            key = stitching.key(*ends)
            if key not in keys:
                keys[key] = len(keys)
                cost = stitching.cost(*ends)
                costs.append((cost.params, cost.macs, cost.bytes))
            numbers.append(keys[key])
        table = np.array(costs, np.int64).reshape(len(costs), 3)
        return np.array(numbers, int)[inverse.reshape(-1)], tuple(keys), table
