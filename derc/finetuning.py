"""derc finetune: a bundle's network is trained, and a new bundle is made of it."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from derc import blockwise, bundle, rivals
from derc.blockwise import Course, Taught
from derc.console import Console
from derc.errors import UsageError
from derc.finetuned import Finetuned, publish
from derc.students import Student, columns_of, open_student, open_teacher, teacher_named, zoo_of
from derc.threads import resolve
from derc.training import TrainOptions, train
from derc.training.checkpoint import Work
from derc.training.data import TrainingData, load
from derc.training.freeze import Freeze
from derc.training.lessons import chosen, lesson
from derc.training.logs import Log
from derc.training.options import flag
from derc.training.outcome import Trained, untrained
from derc.training.score import accuracy

NEUTRAL = ("workers", "checkpoint_s")
"""Options that change nothing of what is trained."""


@dataclass(frozen=True)
class Finetune:
    """What a fine-tuning is asked for.

    `zoo` has the donors, where the bundle's own is not where it was; `measure_s` is how long the engine is measured at
    most; `float32` drops the lower precisions of blocks. Before the epochs, of which there may be none then, donors
    teach blocks in `blockwise` passes over the images: those of the numbers in `blockwise_blocks`, or all that have a
    stitch in front, at the rate `blockwise_lr`, in `blockwise_jobs` processes at once, 0: as many as there are threads
    for. The networks of the bundles in `against` are trained likewise, and the best of all is the answer (`rivals`).
    """

    bundle: Path
    data: str
    output: Path
    freeze: str = "none"
    teacher: str = "none"
    options: TrainOptions = field(default_factory=TrainOptions)
    threads: int = 0
    zoo: str | None = None
    measure_s: float = 20.0
    float32: bool = False
    tensorboard: Path | None = None
    blockwise: int = 0
    blockwise_blocks: str = ""
    blockwise_lr: float | None = None
    blockwise_jobs: int = 0
    against: tuple[Path, ...] = ()

    def every(self) -> tuple[Finetune, ...]:
        """This one and what it is held against, each as a fine-tuning of its own."""
        mine, events = replace(self, against=()), self.tensorboard
        others = [
            replace(mine, bundle=other, tensorboard=events and events / f"against{number}")
            for number, other in enumerate(self.against, 1)
        ]
        return (mine, *others)

    def check(self) -> None:
        """Raise UsageError, naming the option, where a value makes no sense."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        besides = {name: getattr(self, f"blockwise_{name}") for name in ("blocks", "lr", "jobs")}
        blockwise.check(self.blockwise, besides, self.freeze, processes)
        if self.blockwise and self.against:
            raise UsageError(
                "--blockwise does not go with --against: intact donors have nothing to learn block by block"
            )
        replace(self.options, epochs=1 if self.blockwise and not self.options.epochs else self.options.epochs).check()

    def command(self) -> str:
        """The command that repeats this from any directory, the output left out."""
        words = ["derc", "finetune", str(self.bundle.absolute()), "--data", absolute(self.data)]
        names = ("freeze", "teacher", "threads", "zoo", "measure_s", "float32")
        for name in (*names, "blockwise", "blockwise_blocks", "blockwise_lr", "blockwise_jobs"):
            words += _flag(name, getattr(self, name), getattr(Finetune, name))
        for other in self.against:
            words += ["--against", str(other.absolute())]
        for one in fields(TrainOptions):
            default = None if one.name == "lr" else one.default  # which one applies depends on what is frozen
            words += _flag(one.name, getattr(self.options, one.name), default)
        return shlex.join(words)


def _flag(name: str, value: Any, default: Any) -> list[str]:
    """The words of an option, none where it has its default."""
    if value == default or value is None:
        return []
    return [flag(name)] if value is True else [flag(name), str(value)]


def absolute(data: str) -> str:
    """A data set's spec with its path made absolute."""
    kind, separator, path = data.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if separator else data


@dataclass(frozen=True)
class Task:
    """One bundle's network with all that its training needs."""

    asked: Finetune
    manifest: dict[str, Any]
    data: TrainingData
    student: Student
    columns: tuple[int, ...] | None
    teacher: nn.Module | None

    @property
    def freeze(self) -> Freeze:
        return Freeze(self.asked.freeze, self.student.head)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this training the one that it is and no other."""
        asked, data = self.asked, self.data
        options = {name: value for name, value in asdict(asked.options).items() if name not in NEUTRAL}
        return {"parent": self.manifest["seal"], "data": data.digest(), **_record(asked, data)["data"], **options} | {
            "freeze": asked.freeze,
            "teacher": asked.teacher,
            "zoo": asked.zoo,
            "blockwise": [asked.blockwise, asked.blockwise_blocks, asked.blockwise_lr],
        }


def finetune_bundle(asked: Finetune, console: Console) -> dict[str, Any] | None:
    """Train the network of a bundle and write the new one; returns its manifest, None in processes that only help.

    Where it is held against other bundles, their networks are trained likewise, and the new bundle is of the answer.

    Raises IntegrityError for what is no bundle, UsageError for options, labels and a loss that make no sense,
    MissingDependencyError for a package that is not here, and what building the engine raises: OverBudgetError after
    the new bundle was written. What was trained stays in a folder beside the new bundle until that is there.
    """
    started = time.perf_counter()
    console = console if _main() else Console(quiet=True)
    asked.check()
    manifests = [bundle.verify(one.bundle) for one in asked.every()]
    bundle.check_output(asked.output)
    with _threads(asked.threads), ExitStack() as stack:
        tasks = _opened(asked, manifests)
        rivals.check([(one.asked.bundle, one.manifest) for one in tasks], [_learns(one) for one in tasks])
        place = _place(asked.output)
        works = [Work(place / f"against{n}" if n else place, task.identity) for n, task in enumerate(tasks)]
        for work in works if _main() else ():
            work.open()
            stack.callback(work.close)
        with _tidy(works[0]):
            made = [_train(task, work, console) for task, work in zip(tasks, works, strict=True)]
        if not _main():
            return None
        answer = replace(rivals.answer(made, console.say), command=asked.command())
        return publish(answer, works[0], asked.measure_s, started, console)


def _opened(asked: Finetune, manifests: Sequence[dict[str, Any]]) -> list[Task]:
    """The networks that are trained, in order; images of one size are read once for all of them."""
    data: dict[tuple[int, ...], TrainingData] = {}
    tasks = []
    for one, manifest in zip(asked.every(), manifests, strict=True):
        shape = tuple(manifest["input"]["shape"])
        images = data[shape] if shape in data else data.setdefault(shape, load(asked.data, shape, asked.options.seed))
        student = open_student(one.bundle, manifest)
        columns = columns_of(student, manifest, images)
        teacher = open_teacher(one.teacher, manifest, one.zoo, images)
        tasks.append(Task(one, manifest, images, student, columns, teacher))
    return tasks


def _learns(task: Task) -> bool:
    """Whether anything of the network trains."""
    return any(task.freeze(name) for name, _ in task.student.network.named_parameters())


def _train(task: Task, work: Work, console: Console) -> Finetuned:
    """Train one network; what it is worth on the images that choose, and on those that are held out."""
    asked, data, student, columns = task.asked, task.data, task.student, task.columns
    with Log(console, asked.tensorboard if _main() else None, asked.options.epochs) as log:
        before = accuracy(student.network, data.heldout, columns) if _main() else 0.0
        console.say(
            f"training {task.manifest['selected']['assembly']} on {len(data.train)} images, "
            f"choosing by {len(data.validation)} …"
        )
        taught = _taught(task, console) if asked.blockwise else None
        trained = _trained(task, work, log, console, taught)
    after = accuracy(trained.network, data.heldout, columns) if _main() else 0.0
    return Finetuned(
        asked.bundle,
        task.manifest,
        asked.command(),
        {**_record(asked, data), "teacher": teacher_named(asked.teacher, task.manifest)}
        | ({"blockwise": taught.record()} if taught else {}),
        trained,
        {"before": before, "after": after},
        data,
        student.labels or (data.classes if columns is None else None),
        asked.output,
        asked.float32,
        columns,
    )


def _trained(task: Task, work: Work, log: Log, console: Console, taught: Taught | None) -> Trained:
    """The training with labels, after the blocks' own, if there was one."""
    options, student = task.asked.options, task.student
    if taught is not None and not options.epochs:
        trained = untrained(student.network, taught.after if taught.kept else taught.before, options.batch)
    else:
        trained = train(
            student.network,
            task.data.train,
            task.data.validation,
            options,
            trains=task.freeze,
            teacher=task.teacher,
            columns=task.columns,
            work=work,
            say=console.say,
            record=log.row,
        )
    console.check()
    if taught is None:
        return trained
    kept = "blocks" if trained.kept == "before" and taught.kept else trained.kept
    return replace(trained, before=taught.before, kept=kept)


@contextmanager
def _tidy(work: Work) -> Iterator[None]:
    """A training that cannot go on leaves no work folder behind, one that is interrupted does."""
    try:
        yield
    except UsageError:
        if _main():
            work.remove()
        raise


def _taught(task: Task, console: Console) -> Taught:
    """The blocks' own training, by the donors."""
    asked = task.asked
    with console.status("blockwise"):
        course = _course(task)
        names = ", ".join(one.block for one in course.lessons)
        console.say(f"{names}: each learns from its donor, {asked.blockwise} × {len(task.data.train)} images …")
        found = blockwise.learn(
            course,
            lambda block, threads: partial(_teach, asked, block, threads),
            resolve(asked.threads),
            asked.blockwise_jobs,
            task.columns,
            asked.options.allow_worse,
            console.say,
        )
    for line in found.lines():
        console.say(line)
    return found


def _course(task: Task) -> Course:
    """What the blocks learn; raises UsageError where there is nothing to learn, or nobody to learn from."""
    asked, manifest, student = task.asked, task.manifest, task.student
    places = blockwise.places_of(manifest, student.network)
    wanted = chosen(places, asked.blockwise_blocks)
    donors = blockwise.donors_of(lambda: zoo_of(manifest, asked.zoo), manifest, places)
    head = blockwise.head_of(manifest, student.head)
    return Course(
        student.network,
        tuple(lesson(places, place, donors, head, fits=blockwise.linear(student.network, place)) for place in wanted),
        places,
        task.data.train,
        task.data.validation,
        replace(asked.options, epochs=asked.blockwise, lr=asked.blockwise_lr or blockwise.RATE),
        task.freeze,
        _place(asked.output) / "blocks",
        task.identity,
    )


def _teach(asked: Finetune, block: str, threads: int, say: Callable[[str], None]) -> None:
    """Teach one block in another process, which opens everything anew and leaves the block's state in its folder."""
    torch.set_num_threads(threads)
    (task,) = _opened(asked, [bundle.verify(asked.bundle)])
    course = _course(task)
    course.teach(next(one for one in course.lessons if one.block == block), say)


def _place(output: Path) -> Path:
    """The work folder, beside the new bundle."""
    return output.absolute().with_name(f".{output.name}.training")


def _main() -> bool:
    """Whether this process writes files, of several that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def _record(asked: Finetune, data: TrainingData) -> dict[str, Any]:
    """Data and hyperparameters for the manifest."""
    return {
        "data": {
            "spec": absolute(asked.data),
            "train": len(data.train),
            "validation": len(data.validation),
            "heldout": len(data.heldout),
            "classes": len(data.classes),
        },
        "freeze": asked.freeze,
        "options": asdict(asked.options),
        "threads": resolve(asked.threads),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(resolve(count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
