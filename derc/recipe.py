"""Reading a recipe: a TOML file that writes an assembly down, with one ``[[block]]`` table for each block."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from derc.errors import UsageError, suggest
from derc.stitching import PLAIN, Form

Side = Annotated[int, Field(ge=1)]
Pair = Annotated[list[Side], Field(min_length=2, max_length=2)]
WANTED = {
    "block": "must be [[block]] tables",
    "stem": "must be a table",
    "head": "must be a table",
    "first": "must be a unit number or a module path",
    "last": "must be a unit number or a module path",
    "image_size": "must be a positive number or [height, width]",
}
"""What values of more than one type may be."""


class Table(BaseModel):
    """A table of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BlockTable(Table):
    """Units of a donor, `first` and `last` included, by number or as module paths.

    `stitch` is the kind of the stitch in front of the block, `stride` that of the paper's convolution, `regrid`, `map`
    and `rank` are the form of a linear one. With `grid` "keep" the block runs on the grid that it gets, as its donor
    would for images of another size.
    """

    donor: str
    first: int | str
    last: int | str
    stitch: Literal["linear", "dery", "dery-fc"] | None = None
    stride: int = Field(default=1, ge=1)
    regrid: Literal["mean", "strided", "bilinear"] = "mean"
    map: Literal["full", "affine", "identity"] = "full"
    rank: int | None = Field(default=None, ge=1)
    grid: Literal["donor", "keep"] = "donor"

    @property
    def form(self) -> Form:
        """That of the stitch in front, where it is a linear one."""
        return Form(self.regrid, self.map, self.rank or 0)


class StemTable(Table):
    """The first donor's own stem, or a fresh one."""

    kind: Literal["donor", "conv7x7"] = "donor"
    channels: int = Field(default=64, ge=1)


class HeadTable(Table):
    """The last donor's own head, or a fresh linear one of `classes` outputs."""

    kind: Literal["donor", "linear"] = "donor"
    classes: int | None = Field(default=None, ge=1)


class Recipe(Table):
    """An assembly as its user writes it down.

    `weights` "none" takes the donors' architectures alone, fresh under a fixed seed. `image_size` is (H, W) or the side
    of a square and replaces the donors' own.
    """

    zoo: str | None = None
    weights: Literal["donor", "none"] = "donor"
    image_size: Side | Pair | None = None
    block: list[BlockTable] = Field(default_factory=list)
    stem: StemTable = StemTable()
    head: HeadTable = HeadTable()

    @property
    def size(self) -> tuple[int, int] | None:
        """The image size as (H, W)."""
        if self.image_size is None:
            return None
        sides = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        return sides[0], sides[-1]


TABLES: dict[str, type[Table]] = {"block": BlockTable, "stem": StemTable, "head": HeadTable}


def read_recipe(path: Path) -> Recipe:
    """The recipe in the file `path`; its zoo, where it is a file, is taken relative to it.

    Raises UsageError that says which table and key are wrong.
    """
    try:
        recipe = Recipe.model_validate(_tree(path))
    except ValidationError as error:
        raise UsageError(f"recipe {path}, {_complaint(error)}") from error
    problem = _problem(recipe)
    if problem:
        raise UsageError(f"recipe {path}{problem}")
    beside = path.resolve().parent / (recipe.zoo or "")
    return recipe.model_copy(update={"zoo": str(beside)}) if recipe.zoo and beside.is_file() else recipe


def _tree(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}") from error


def _problem(recipe: Recipe) -> str | None:
    """What is wrong with tables that are each in order."""
    if not recipe.block:
        return " has no blocks: write a [[block]] table for each block, in order"
    if recipe.head.kind == "linear" and recipe.head.classes is None:
        return ", [head]: a linear head needs its number of classes, such as classes = 1000"
    if recipe.head.kind == "donor" and recipe.head.classes is not None:
        return ', [head]: classes is for kind = "linear"; a donor\'s head has its own'
    if recipe.block[0].stitch and recipe.stem.kind == "donor":
        return ', block 1: a stitch before the first block needs a fresh stem, kind = "conv7x7"'
    for number, block in enumerate(recipe.block, start=1):
        if block.stride > 1 and block.stitch != "dery":
            return f', block {number}: stride is for stitch = "dery"; the linear stitch regrids by itself'
        if block.stitch != "linear" and block.form != PLAIN:
            return f', block {number}: regrid, map and rank are for stitch = "linear": write that too'
    return None


def _complaint(error: ValidationError) -> str:
    """The first thing wrong, with its table and key."""
    first = error.errors()[0]
    table, *rest = first["loc"]
    numbers = [part for part in rest if isinstance(part, int)]
    kind = TABLES.get(str(table)) if table != "block" or numbers else None
    keys = [part for part in rest if isinstance(part, str)]
    where = f"[{table}]" if kind and table != "block" else f"block {numbers[0] + 1}" if kind else "top level"
    key = keys[0] if kind and keys else str(table)
    known = (kind or Recipe).model_fields
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}, known: {', '.join(known)}{suggest(key, known)}"
    if first["type"] == "missing":
        return f"{where}: the key {key!r} is missing"
    hint = suggest(str(first["input"]), _choices(first)) if first["type"] == "literal_error" else ""
    message = WANTED.get(key, first["msg"].replace("Input should", "must").replace("must be a valid", "must be a"))
    return f"{where}: {key} {message}, not {first['input']!r}{hint}"


def _choices(problem: Any) -> list[str]:
    """The words that a key may have, from pydantic's list `'a', 'b' or 'c'`."""
    words = str(problem["ctx"]["expected"]).replace(" or ", ", ").split(",")
    return [word.strip("' ") for word in words]
