"""derc finetune --blockwise: a bundle's own donors teach its blocks, each on its own, before the network trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import tee
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from derc import children
from derc.artifacts import BlockRef
from derc.errors import DercError, UsageError
from derc.fitting import fit
from derc.mode import in_eval
from derc.modules import Stitch
from derc.training.blockwise import Lesson, teach, to_fit
from derc.training.checkpoint import Work
from derc.training.examples import Examples
from derc.training.freeze import Trains
from derc.training.lessons import Place
from derc.training.options import TrainOptions
from derc.training.outcome import Row, Scored, Trained
from derc.training.score import scored
from derc.workspace import LiveDonors
from derc.zoo import Zoo

RATE = 1e-2
"""Learning rate unless told otherwise (docs/finetune.md)."""
COLUMNS = ("block", "pass", "step", "lr", "loss", "validation_loss", "images", "seconds")
"""Of a row of the log; losses are shares of the target's variance that are missed."""


def fitted(stitch: nn.Module, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set a linear stitch by ridge regression so that it gives the second values for the first."""
    sources, targets = tee(pairs)
    fit(cast("Stitch", stitch), (one for one, _ in sources), (other for _, other in targets))


@dataclass(frozen=True)
class Course:
    """All lessons of a network; the state of each block is kept in `folder`, bound to `identity`, any JSON value."""

    network: nn.Module
    lessons: tuple[Lesson, ...]
    places: tuple[Place, ...]
    images: Examples
    validation: Examples
    options: TrainOptions
    trains: Trains
    folder: Path
    identity: Mapping[str, Any]

    def teach(self, lesson: Lesson, say: Callable[[str], None]) -> Trained:
        """Teach one block of the network, from where it was left; one that is finished is not taught again."""
        work = self._work(lesson)
        work.open()

        def record(row: Row) -> None:
            done = f"pass {row['epoch']}/{self.options.epochs}"
            say(f"{lesson.block}  {done}  misses {row['validation_loss']:.4f}  {row['seconds']:.0f} s")

        try:
            return teach(
                self.network,
                lesson,
                self.images,
                self.validation,
                self.options,
                trains=self.trains,
                fit=fitted,
                work=work,
                say=lambda text: say(f"{lesson.block}  {text}"),
                record=record,
            )
        finally:
            work.close()

    def finished(self, lesson: Lesson) -> bool:
        """Whether a block has been taught to the end."""
        steps = self.options.epochs * (len(self.images) // min(self.options.batch, len(self.images)))
        work = self._work(lesson)
        work.open()
        try:
            state = work.load()
        finally:
            work.close()
        return state is not None and bool(state["step"] >= steps)

    def _work(self, lesson: Lesson) -> Work:
        return Work(self.folder / lesson.block, {**self.identity, "block": lesson.block})


@dataclass(frozen=True)
class Taught:
    """What came of a course: each block's training by name, and what the whole network was worth before and after.

    `joined` is whether stitches were fitted anew, afterwards, to what reaches them. `kept` is whether the network has
    the taught weights; else it has those that it came with.
    """

    course: Course
    blocks: Mapping[str, Trained]
    before: Scored
    after: Scored
    joined: bool
    kept: bool
    jobs: int
    threads: int

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "passes": self.course.options.epochs,
            "lr": self.course.options.lr,
            "jobs": self.jobs,
            "threads": self.threads,
            "images": sum(one.images for one in self.blocks.values()),
            "seconds": round(sum(one.seconds for one in self.blocks.values()), 3),
            "joined": self.joined,
            "kept": self.kept,
            "validation": {"before": self.before.accuracy, "after": self.after.accuracy},
            "blocks": [self._block(lesson) for lesson in self.course.lessons],
            "log": self.rows(),
        }

    def _block(self, lesson: Lesson) -> dict[str, Any]:
        one = self.blocks[lesson.block]
        spec = next(place.spec for place in self.course.places if place.name == lesson.block)
        return {
            "block": lesson.block,
            "units": str(spec.plain),
            "input_of": None if lesson.given is None else lesson.donors[0],
            "compared": "features" if lesson.tap else "values",
            "loss": {"before": round(one.before.loss, 6), "after": round(one.after.loss, 6)},
            "kept": one.kept != "before",
            "pass": one.epoch,
            "images": one.images,
            "seconds": round(one.seconds, 3),
        }

    def rows(self) -> list[Row | dict[str, Any]]:
        """The log: a row for each pass of each block."""
        found: list[Row | dict[str, Any]] = []
        for name, one in self.blocks.items():
            every = ({**row, "block": name, "pass": row["epoch"]} for row in one.rows)
            found += [{column: row[column] for column in COLUMNS} for row in every]
        return found

    def lines(self) -> list[str]:
        """What is to be said of it."""
        found = []
        for block in self.record()["blocks"]:
            loss, kept = block["loss"], block["kept"]
            what = f"{loss['before']:.4f} to {loss['after']:.4f}" if kept else f"{loss['before']:.4f}, no better"
            found.append(f"{block['block']} misses of what {block['units']} is to give {what}")
        before, after = self.before.accuracy, self.after.accuracy
        joined = ", stitches fitted anew to what reaches them" if self.joined else ""
        end = joined if self.kept else ": the blocks keep the weights that they came with"
        return [*found, f"block by block: validation {before:.4f} to {after:.4f}{end}"]


def places_of(manifest: Mapping[str, Any], network: nn.Module) -> tuple[Place, ...]:
    """The blocks of a bundle's network; raises UsageError where its manifest has others."""
    selected, names = manifest["selected"], {one.name for one in fields(BlockRef)}
    parted = {int(stitch["before"]) for stitch in selected["stitches"]}
    found: list[Place] = []
    for index, block in enumerate(selected["blocks"]):
        spec = BlockRef(**{key: value for key, value in block.items() if key in names}).plain
        if index and index not in parted:
            found[-1] = replace(found[-1], spec=replace(found[-1].spec, last=spec.last))
            continue
        stem = ("stem",) if index == 0 and "stem" in selected else ()
        stitch = (f"stitch{len(found)}",) if index in parted else ()
        found.append(Place(len(found), spec, stem + stitch))
    wanted = [part for place in found for part in place.parts] + ["head"] * ("head" in selected)
    if [name for name, _ in network.named_children()] != wanted:
        raise UsageError("the blocks of this bundle's manifest are not those of its model.py: leave --blockwise out")
    return tuple(found)


def linear(network: nn.Module, place: Place) -> bool:
    """Whether the stitch in front of a block is derc's own, which is linear."""
    return bool(place.before) and type(network.get_submodule(place.before[-1])).__name__ == Stitch.__name__


def donors_of(zoo: Callable[[], Zoo], manifest: Mapping[str, Any], places: Iterable[Place]) -> LiveDonors:
    """The donors that the network is made of, as they were then.

    Raises UsageError where one cannot be had, has changed, or takes images of another size than the network.
    """
    again, size = "give the zoo that the bundle was made from with --zoo", tuple(manifest["input"]["shape"])
    try:
        found = zoo()
        donors = {name: found[name] for name in dict.fromkeys(place.spec.donor for place in places)}
    except DercError as error:
        raise UsageError(f"the donors that --blockwise learns from cannot be had ({error}): {again}") from error
    for name, donor in donors.items():
        known = manifest["donors"].get(name, {}).get("sha256")
        if known is not None and not manifest.get("head") and donor.digest() != known:
            raise UsageError(f"donor {name} of {found.name} is not what the bundle was made from: {again}")
        if donor.input_size != size:
            raise UsageError(
                f"donor {name} takes images of {donor.input_size}, and the network {size}, so it shows its blocks "
                "nothing: leave --blockwise out"
            )
    return LiveDonors(found, manifest["zoo"]["negligible"])


def head_of(manifest: Mapping[str, Any], head: str | None) -> tuple[str, str] | None:
    """The paths, in the network and its last donor, of a last layer that was fitted to other labels; else None."""
    fitted = (manifest.get("head") or {}).get("network")
    return (head, fitted["layer"]) if fitted and head is not None else None


def learn(
    course: Course,
    teach_one: Callable[[str, int], children.Work],
    threads: int,
    jobs: int,
    columns: tuple[int, ...] | None,
    allow_worse: bool,
    say: Callable[[str], None],
) -> Taught:
    """Teach all blocks, in at most `jobs` processes at once (0: one for each block that has a thread), and choose.

    `teach_one` makes what a process does, for a block's name and a number of threads. The network ends with the taught
    weights, or, unless `allow_worse`, with its own where those are more accurate on the validation images. `threads`
    are divided evenly among the blocks, whatever `jobs` is, so that the weights do not depend on it.
    """
    before = scored(course.network, course.validation, columns)
    state = {name: value.clone() for name, value in course.network.state_dict().items()}
    most = min(threads, len(course.lessons))
    each, jobs = max(1, threads // most), jobs or (1 if torch.cuda.is_available() else most)
    left = [lesson.block for lesson in course.lessons if not course.finished(lesson)]
    aside = left if min(jobs, len(left)) > 1 else []
    children.run([(block, teach_one(block, each)) for block in aside], jobs, say)
    blocks = _collected(course, each, set(left) - set(aside), say)
    after, joined = scored(course.network, course.validation, columns), False
    separate = {name: value.clone() for name, value in course.network.state_dict().items()}
    if join(course):
        together = scored(course.network, course.validation, columns)
        after, joined = (together, True) if together.rank > after.rank else (after, False)
    if not joined:
        course.network.load_state_dict(separate)
    kept = allow_worse or after.accuracy >= before.accuracy
    if not kept:
        course.network.load_state_dict(state)
    moved = any(one.kept != "before" for one in blocks.values())
    return Taught(course, blocks, before, after, joined, kept and moved, jobs, each)


@torch.no_grad()
def join(course: Course) -> bool:
    """Fit stitches anew, in order, so that they give for what reaches them what they give for the intact donor's value.

    Returns whether there was one to fit. The first one in the network gets its donor's value as it is.
    """
    names = [name for name, _ in course.network.named_children()]
    first = next((place.parts[0] for place in course.places if place.before), None)
    found = False
    with in_eval(course.network):
        for lesson in course.lessons:
            if lesson.stitch is None or lesson.given is None or lesson.stitch == first:
                continue
            stitch, given = course.network.get_submodule(lesson.stitch), lesson.given.cpu()
            front = nn.Sequential(*(course.network.get_submodule(n) for n in names[: names.index(lesson.stitch)]))
            was, found = copy.deepcopy(stitch), True
            fitted(stitch, _reaching(course.images, front, given, was))
    return found


def _reaching(
    images: Examples, front: nn.Module, given: nn.Module, was: nn.Module
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What reaches a stitch, and what it gave, as it was, for what the intact donor gives."""
    for x in to_fit(images):
        yield front(x.clone()), was(given(x.clone()))


def _collected(course: Course, threads: int, aloud: set[str], say: Callable[[str], None]) -> dict[str, Trained]:
    """The blocks' trainings, those that are not finished done here; only what is said of the blocks `aloud` is said."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {one.block: course.teach(one, say if one.block in aloud else lambda _: None) for one in course.lessons}
    finally:
        torch.set_num_threads(before)


def check(blockwise: int, besides: Mapping[str, Any], freeze: str, processes: int) -> None:
    """Raise UsageError where the options make no sense; `besides` are its blocks, lr and jobs."""
    for name, value in (("--blockwise", blockwise), ("--blockwise-jobs", besides["jobs"])):
        if value < 0:
            raise UsageError(f"{name} is {value}, and must be 0 or more")
    if not blockwise and any(besides.values()):
        given = next(name for name, value in besides.items() if value)
        raise UsageError(f"--blockwise-{given} goes with --blockwise, the number of passes over the images: give both")
    if besides["lr"] is not None and not (besides["lr"] > 0 and math.isfinite(besides["lr"])):
        raise UsageError(f"--blockwise-lr is {besides['lr']}, and must be a number above 0")
    if blockwise and freeze == "all-but-head":
        raise UsageError(
            "--blockwise teaches stitches and blocks, which --freeze all-but-head leaves as they are: give --freeze "
            "blocks or none"
        )
    if blockwise and processes > 1:
        raise UsageError(
            "--blockwise starts its own processes: run it with --epochs 0 and no launcher, and train what it gives"
        )
