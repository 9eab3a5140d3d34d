"""derc finetune: a bundle's network is trained, and a new bundle is made of it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from derc import blockwise, bundle
from derc.blockwise import Course, Taught
from derc.console import Console
from derc.data import label_map
from derc.emitted import imported
from derc.errors import DercError, MissingDependencyError, UsageError
from derc.finetuned import Finetuned, publish
from derc.threads import resolve
from derc.training import TrainOptions, train
from derc.training.checkpoint import Work
from derc.training.data import TrainingData, load, some
from derc.training.freeze import Freeze, last_layer
from derc.training.lessons import chosen, lesson
from derc.training.logs import Log
from derc.training.options import flag
from derc.training.outcome import Trained, untrained
from derc.training.score import accuracy
from derc.training.teacher import teacher_of
from derc.zoo import Zoo

TEACHERS = ("donor", "none")
"""Besides the donors' names: the donor whose last block the network has, or nobody."""


@dataclass(frozen=True)
class Finetune:
    """What a fine-tuning is asked for.

    `zoo` has the donors, where the bundle's own is not where it was; `measure_s` is how long the engine is measured at
    most; `float32` drops the lower precisions of blocks. Before the epochs, of which there may be none then, donors
    teach blocks in `blockwise` passes over the images: those of the numbers in `blockwise_blocks`, or all that have a
    stitch in front, at the rate `blockwise_lr`, in `blockwise_jobs` processes at once, 0: as many as there are threads
    for.
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

    def check(self) -> None:
        """Raise UsageError, naming the option, where a value makes no sense."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        besides = {name: getattr(self, f"blockwise_{name}") for name in ("blocks", "lr", "jobs")}
        blockwise.check(self.blockwise, besides, self.freeze, processes)
        replace(self.options, epochs=1 if self.blockwise and not self.options.epochs else self.options.epochs).check()

    def command(self) -> str:
        """The command that repeats this from any directory, the output left out."""
        words = ["derc", "finetune", str(self.bundle.absolute()), "--data", absolute(self.data)]
        names = ("freeze", "teacher", "threads", "zoo", "measure_s", "float32")
        for name in (*names, "blockwise", "blockwise_blocks", "blockwise_lr", "blockwise_jobs"):
            words += _flag(name, getattr(self, name), getattr(Finetune, name))
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
class Student:
    """The network of a bundle, the path of its last linear layer, and its outputs' names where they are known."""

    network: nn.Module
    head: str | None
    labels: tuple[str, ...] | None


def finetune_bundle(asked: Finetune, console: Console) -> dict[str, Any] | None:
    """Train the network of a bundle and write the new one; returns its manifest, None in processes that only help.

    Raises IntegrityError for what is no bundle, UsageError for options, labels and a loss that make no sense,
    MissingDependencyError for a package that is not here, and what building the engine raises: OverBudgetError after
    the new bundle was written. What was trained stays in a folder beside the new bundle until that is there.
    """
    started = time.perf_counter()
    console = console if _main() else Console(quiet=True)
    asked.check()
    manifest = bundle.verify(asked.bundle)
    bundle.check_output(asked.output)
    with _threads(asked.threads), ExitStack() as stack:
        data = load(asked.data, tuple(manifest["input"]["shape"]), asked.options.seed)
        student = open_student(asked.bundle, manifest)
        columns = columns_of(student, manifest, data)
        teacher = _teacher(asked, manifest, data)
        freeze = Freeze(asked.freeze, student.head)
        work = Work(_place(asked.output), _identity(asked, manifest, data))
        if _main():
            work.open()
            stack.callback(work.close)
        log = stack.enter_context(Log(console, asked.tensorboard if _main() else None, asked.options.epochs))
        before = accuracy(student.network, data.heldout, columns) if _main() else 0.0
        console.say(f"training on {len(data.train)} images, choosing by {len(data.validation)} …")
        with _tidy(work):
            taught = _taught(asked, manifest, data, student, columns, console) if asked.blockwise else None
            trained = _trained(asked, student, data, work, log, freeze, teacher, columns, console, taught)
        if not _main():
            return None
        after = accuracy(trained.network, data.heldout, columns)
        made = Finetuned(
            asked.bundle,
            manifest,
            asked.command(),
            {**_record(asked, data), "teacher": _taught_by(asked, manifest)}
            | ({"blockwise": taught.record()} if taught else {}),
            trained,
            {"before": before, "after": after},
            data,
            student.labels or (data.classes if columns is None else None),
            asked.output,
            asked.float32,
        )
        return publish(made, work, asked.measure_s, started, console)


def _trained(
    asked: Finetune,
    student: Student,
    data: TrainingData,
    work: Work,
    log: Log,
    freeze: Freeze,
    teacher: nn.Module | None,
    columns: tuple[int, ...] | None,
    console: Console,
    taught: Taught | None,
) -> Trained:
    """The training with labels, after the blocks' own, if there was one."""
    if taught is not None and not asked.options.epochs:
        trained = untrained(student.network, taught.after if taught.kept else taught.before, asked.options.batch)
    else:
        trained = train(
            student.network,
            data.train,
            data.validation,
            asked.options,
            trains=freeze,
            teacher=teacher,
            columns=columns,
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


def _taught(
    asked: Finetune,
    manifest: dict[str, Any],
    data: TrainingData,
    student: Student,
    columns: tuple[int, ...] | None,
    console: Console,
) -> Taught:
    """The blocks' own training, by the donors."""
    with console.status("blockwise"):
        course = _course(asked, manifest, data, student)
        names = ", ".join(one.block for one in course.lessons)
        console.say(f"{names}: each learns from its donor, {asked.blockwise} × {len(data.train)} images …")
        found = blockwise.learn(
            course,
            lambda block, threads: partial(_teach, asked, block, threads),
            resolve(asked.threads),
            asked.blockwise_jobs,
            columns,
            asked.options.allow_worse,
            console.say,
        )
    for line in found.lines():
        console.say(line)
    return found


def _course(asked: Finetune, manifest: dict[str, Any], data: TrainingData, student: Student) -> Course:
    """What the blocks learn; raises UsageError where there is nothing to learn, or nobody to learn from."""
    places = blockwise.places_of(manifest, student.network)
    wanted = chosen(places, asked.blockwise_blocks)
    donors = blockwise.donors_of(lambda: _zoo(manifest, asked.zoo), manifest, places)
    head = blockwise.head_of(manifest, student.head)
    return Course(
        student.network,
        tuple(lesson(places, place, donors, head, fits=blockwise.linear(student.network, place)) for place in wanted),
        places,
        data.train,
        data.validation,
        replace(asked.options, epochs=asked.blockwise, lr=asked.blockwise_lr or blockwise.RATE),
        Freeze(asked.freeze, student.head),
        _place(asked.output) / "blocks",
        _identity(asked, manifest, data),
    )


def _teach(asked: Finetune, block: str, threads: int, say: Callable[[str], None]) -> None:
    """Teach one block in another process, which opens everything anew and leaves the block's state in its folder."""
    torch.set_num_threads(threads)
    manifest = bundle.verify(asked.bundle)
    data = load(asked.data, tuple(manifest["input"]["shape"]), asked.options.seed)
    course = _course(asked, manifest, data, open_student(asked.bundle, manifest))
    course.teach(next(one for one in course.lessons if one.block == block), say)


def _place(output: Path) -> Path:
    """The work folder, beside the new bundle."""
    return output.absolute().with_name(f".{output.name}.training")


def _main() -> bool:
    """Whether this process writes files, of several that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def _identity(asked: Finetune, manifest: dict[str, Any], data: TrainingData) -> dict[str, Any]:
    """What makes a training this one and no other."""
    options = {name: value for name, value in asdict(asked.options).items() if name not in ("workers", "checkpoint_s")}
    return {"parent": manifest["seal"], "data": data.digest(), **_record(asked, data)["data"], **options} | {
        "freeze": asked.freeze,
        "teacher": asked.teacher,
        "zoo": asked.zoo,
        "blockwise": [asked.blockwise, asked.blockwise_blocks, asked.blockwise_lr],
    }


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


def open_student(folder: Path, manifest: dict[str, Any]) -> Student:
    """The network of a verified bundle.

    Raises MissingDependencyError where it needs a package that is not here.
    """
    zoo = Path(manifest["zoo"]["spec"])
    beside = [str(zoo.absolute().parent)] if zoo.suffix == ".toml" else []
    sys.path[:0] = beside
    try:
        with imported(folder / "model.py") as module:
            network: nn.Module = module.build(weights=folder / "weights.safetensors")
            head = last_layer(network, torch.zeros(1, *manifest["input"]["shape"]))
            return Student(network, head, _labels(manifest))
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the network in {folder} needs the package {error.name}, which is not here: install it, or put it on the "
            "PYTHONPATH"
        ) from error
    finally:
        for entry in beside:
            sys.path.remove(entry)


def _labels(manifest: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of the network's outputs: as the manifest has them, or those of the donor that it ends with."""
    fitted = manifest.get("head") or {}
    if manifest.get("classes") or fitted.get("network"):
        return tuple(manifest.get("classes") or fitted["classes"])
    if "head" in manifest["selected"]:
        return None
    try:
        return _zoo(manifest)[tail(manifest)].labels
    except DercError:
        return None


def tail(manifest: dict[str, Any]) -> str:
    """The donor of the network's last block."""
    name: str = manifest["selected"]["blocks"][-1]["donor"]
    return name


def _zoo(manifest: dict[str, Any], spec: str | None = None) -> Zoo:
    """The zoo that the bundle was made from, as its manifest says, or another; raises the errors of `Zoo.load`."""
    said = manifest["zoo"]
    size = tuple(said["input_size"]) if said.get("input_size") else None
    return Zoo.load(spec or said["spec"], input_size=size, check=lambda _: None)


def columns_of(student: Student, manifest: dict[str, Any], data: TrainingData) -> tuple[int, ...] | None:
    """The output that stands for each class, None where that is their order; raises UsageError for other classes."""
    with torch.no_grad():
        outputs = student.network(torch.zeros(1, *manifest["input"]["shape"])).shape[1]
    labels = student.labels or tuple(map(str, range(outputs)))
    columns = label_map(labels, data.classes) if len(labels) == outputs else None
    if columns is None:
        raise UsageError(
            f"the labels of {data.name} ({some(data.classes)}) are not the network's ({some(labels)}): give images of "
            "the classes that it knows, or compile with these"
        )
    return None if columns == tuple(range(outputs)) else columns


def _taught_by(asked: Finetune, manifest: dict[str, Any]) -> str | None:
    if asked.teacher == "none":
        return None
    return tail(manifest) if asked.teacher == "donor" else asked.teacher


def _teacher(asked: Finetune, manifest: dict[str, Any], data: TrainingData) -> nn.Module | None:
    """The teacher; raises UsageError where it is unknown or cannot teach these classes."""
    name = _taught_by(asked, manifest)
    if name is None:
        return None
    try:
        donor = _zoo(manifest, asked.zoo)[name]
    except DercError as error:
        raise UsageError(
            f"the teacher {name} cannot be had ({error}): give its zoo with --zoo, or --teacher none"
        ) from error
    return teacher_of(donor, data.classes)
