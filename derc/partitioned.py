"""The donors' blocks and the equivalence sets that they fall into, as artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from derc.stitching import Forms


@dataclass(frozen=True, order=True)
class BlockRef:
    """Units of a donor from its cut `first` to its cut `last`; a member of equivalence set `set`.

    Its insides are computed in `precision` where it is deployed; what goes in and out is float32.
    """

    donor: str
    first: int
    last: int
    set: int
    precision: str = "fp32"

    @cached_property
    def plain(self) -> BlockRef:
        """The same block in float32."""
        return self if self.precision == "fp32" else replace(self, precision="fp32")

    def __str__(self) -> str:
        return f"{self.donor}[{self.first}:{self.last}]" + (f"@{self.precision}" if self.precision != "fp32" else "")


@dataclass(frozen=True)
class NearTie:
    """Set `set` of a donor ends at `cut`, and could end at `other` for `loss`, a share of the objective."""

    donor: str
    set: int
    cut: int
    other: int
    loss: float


@dataclass(frozen=True)
class Partition:
    """Each donor's blocks, in order and in rising equivalence sets; `objective` is the summed similarity.

    Block k is in set k, except of a donor with fewer units than there are sets, of which each unit is a block.
    `bound` is what no partition exceeds, where the exact program was solved. `centres` are the donors of the sets'
    central blocks, where likeness to these is what is summed. `moved` is the share of interior cuts that lie elsewhere
    by one half of the probe set alone; `near_ties` are those of them that might as well. `distinct` is, for each number
    of blocks that was tried, the smallest share over the sets of blocks that would not rather be in another one.
    `forms[a][b]` is that of a stitch from cut a to cut b (`StitchLosses.name`) where it is not the default one.
    """

    blocks: dict[str, tuple[BlockRef, ...]]
    objective: float
    bound: float | None
    epsilon: dict[str, float]
    """The size slack that each donor's blocks have: the option's where it is attainable, else the least possible."""
    centres: tuple[str, ...] = ()
    moved: float | None = None
    near_ties: tuple[NearTie, ...] = ()
    distinct: dict[str, float] = field(default_factory=dict)
    forms: Forms = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """How far the bound is above the objective, as a share of it; None where there is no bound."""
        return None if self.bound is None else max(self.bound - self.objective, 0.0) / max(abs(self.objective), 1e-12)
