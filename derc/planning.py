"""From a recipe to an assembly: its donors at the sizes that its blocks need, and each block between two cuts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from derc.artifacts import Assembly, BlockRef, Head, Joint, Stem
from derc.donor import Donor
from derc.errors import UsageError, suggest
from derc.ir import TensorType
from derc.lowered import Call, Lowered
from derc.parts import check_joint, stem_type, strided
from derc.passes.cut import find_cuts
from derc.recipe import BlockTable, Recipe
from derc.sizes import at_size
from derc.stitching import describe
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo


@dataclass(frozen=True)
class Plan:
    """An assembly with its live donors, every cut kept; `zoo` holds the donors that it uses.

    A donor that runs on another grid than its own is one more donor, called ``NAME@HxW`` after its image size.
    """

    assembly: Assembly
    zoo: Zoo
    lowered: dict[str, Lowered]
    image: tuple[int, int, int]


def plan(recipe: Recipe, zoo: Zoo, size: tuple[int, ...] | None = None) -> Plan:
    """The assembly that `recipe` writes down, of donors of `zoo`; images of `size` win over the recipe's.

    Raises UsageError, naming the block, where a donor, path or unit does not exist or no stitch can join two blocks.
    """
    planner = _Planner(recipe, zoo, size or recipe.size)
    for number in range(len(recipe.block)):
        try:
            planner.add(number)
        except UsageError as error:
            raise UsageError(f"block {number + 1}: {error}") from error
    return planner.plan()


@dataclass
class _Planner:
    """Adds one block after the other; `value` is what the blocks before give."""

    recipe: Recipe
    zoo: Zoo
    size: tuple[int, ...] | None
    donors: dict[str, Donor] = field(default_factory=dict)
    lowered: dict[str, Lowered] = field(default_factory=dict)
    blocks: list[BlockRef] = field(default_factory=list)
    joints: list[Joint | None] = field(default_factory=list)
    stem: Stem | None = None
    value: TensorType | None = None

    def plan(self) -> Plan:
        """What was added, as a plan."""
        head = Head(self.recipe.head.classes) if self.recipe.head.classes else None
        assembly = Assembly(tuple(self.blocks), tuple(self.joints), self.stem, head)
        used = {name: self.donors[name] for name in assembly.donors}
        image = self.stem.image if self.stem else used[self.blocks[0].donor].input_size
        return Plan(assembly, Zoo(self.zoo.name, tuple(used.values())), {n: self.lowered[n] for n in used}, image)

    def add(self, number: int) -> None:
        """Find block `number` in its donor, and the stitch in front of it."""
        table = self.recipe.block[number]
        donor = self._donor(table.donor)
        lowered = self._open(donor)
        first, last = ends(table, lowered)
        if number == 0 and self.recipe.stem.kind == "conv7x7":
            self.stem = Stem(self.recipe.stem.channels, donor.input_size, donor.mean, donor.std)
            self.value = stem_type(self.stem)
        elif number == 0:
            first = 0
        if number == len(self.recipe.block) - 1 and self.recipe.head.kind == "donor":
            last = len(lowered.units)
        joint = None
        if self.value is not None:
            if table.grid == "keep":
                donor, lowered = self._resized(donor, lowered, first, self._arriving(table, self.value))
            joint = self._joint(table, donor.name, first, lowered.cuts[first].type)
        self.blocks.append(BlockRef(donor.name, first, last, number))
        self.joints.append(joint)
        self.value = lowered.cuts[last].type

    def _donor(self, name: str) -> Donor:
        """The zoo's donor as the recipe wants it."""
        donor = self.zoo[name]
        if self.recipe.weights == "none":
            donor = replace(donor, weights=None, pretrained=False)
        return donor if self.size is None else at_size(donor, self.size)

    def _open(self, donor: Donor) -> Lowered:
        if donor.name not in self.lowered:
            self.donors[donor.name] = donor
            self.lowered[donor.name] = LiveDonors(Zoo(self.zoo.name, (donor,)), 0.0)[donor.name]
        return self.lowered[donor.name]

    def _arriving(self, table: BlockTable, value: TensorType) -> tuple[int, int] | None:
        """The grid that reaches a block: the paper's stitch divides it by its stride."""
        return strided(Joint(table.stitch or "linear", table.stride), value)

    def _resized(
        self, donor: Donor, lowered: Lowered, first: int, grid: tuple[int, int] | None
    ) -> tuple[Donor, Lowered]:
        """The donor for images of the size at which its cut `first` has this grid."""
        own, sides = lowered.cuts[first].type.spatial, donor.input_size[1:]
        if grid == own and grid is not None:
            return donor, lowered
        if grid is None or own is None:
            raise UsageError('grid = "keep" needs positions on both sides: leave it out')
        size = tuple(side * have // want for side, have, want in zip(sides, grid, own, strict=True))
        try:
            resized = replace(at_size(donor, size), name=f"{donor.name}@{size[0]}x{size[1]}")
            found = self._open(resized)
        except UsageError as error:
            raise UsageError(f'{error}: leave grid = "keep" out') from error
        if len(found.cuts) != len(lowered.cuts) or found.cuts[first].type.spatial != grid:
            raise UsageError(f'no image size gives {donor.name} a grid of {grid} here: leave grid = "keep" out')
        return resized, found

    def _joint(self, table: BlockTable, donor: str, first: int, target: TensorType) -> Joint | None:
        """The stitch in front of a block; none after a stem that fits, or between units that follow each other."""
        if self.value is None:
            return None
        if table.stitch is None and self.blocks and (self.blocks[-1].donor, self.blocks[-1].last) == (donor, first):
            return None
        if table.stitch is None and not self.blocks:
            if (self.value.layout, self.value.shape) == (target.layout, target.shape):
                return None
            raise UsageError(
                f"the stem gives {describe(self.value)} where {describe(target)} is wanted: set its channels, or give "
                'the block grid = "keep" or a stitch'
            )
        joint = Joint(table.stitch or "linear", table.stride, table.form)
        check_joint(joint, self.value, target)
        return joint


def ends(table: BlockTable, lowered: Lowered) -> tuple[int, int]:
    """The cuts between which a block lies.

    Raises UsageError for what is no unit or module of the donor, has no cut there, or ends before it begins.
    """
    first, last = (_cut(end, lowered, table.donor, last) for last, end in enumerate((table.first, table.last)))
    if first >= last:
        raise UsageError(f"first = {table.first!r} comes after last = {table.last!r}: exchange them")
    return first, last


def _cut(end: int | str, lowered: Lowered, donor: str, last: int) -> int:
    """The cut in front of unit or module `end`, or with `last` 1 the one behind it."""
    places = {cut.name: place for place, cut in enumerate(lowered.cuts)}
    if isinstance(end, int):
        shown = find_cuts(lowered.graph, NEGLIGIBLE)
        if not 0 <= end < len(shown.units):
            raise UsageError(
                f"{donor} has no unit {end}: its units are 0 to {len(shown.units) - 1}, unit n from row n to row n + 1 "
                "of derc zoo show"
            )
        return places[shown.cuts[end + last].name]
    usable = {call.path: place for call in lowered.calls if (place := places.get(_end(call, last))) is not None}
    if end in usable:
        return usable[end]
    order = [name for name, _ in lowered.module.named_modules() if name]
    if end not in order:
        raise UsageError(f"{donor} has no module {end!r}{suggest(end, usable)}")
    near = sorted(usable, key=lambda path: abs(order.index(path) - order.index(end)))[:2]
    side, verb = ("output", "ends") if last else ("input", "begins")
    raise UsageError(
        f"the {side} of {end} is no cut of {donor}, for other values bypass it: what {verb} at one nearby is "
        + " or ".join(near)
    )


def _end(call: Call, last: int) -> str:
    return call.result if last else call.argument
