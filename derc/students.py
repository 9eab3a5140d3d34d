"""The network of a bundle as one that learns: its labels, its classes, and the donor that may teach it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from derc.data import label_map
from derc.emitted import imported
from derc.errors import DercError, MissingDependencyError, UsageError
from derc.training.data import TrainingData, some
from derc.training.freeze import last_layer
from derc.training.teacher import teacher_of
from derc.zoo import Zoo

NOBODY, TAIL = "none", "donor"
"""Who may teach, besides the donors by their names: nobody, or the donor whose last block the network has."""


@dataclass(frozen=True)
class Student:
    """The network of a bundle, the path of its last linear layer, and its outputs' names where they are known."""

    network: nn.Module
    head: str | None
    labels: tuple[str, ...] | None


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
        return zoo_of(manifest)[tail(manifest)].labels
    except DercError:
        return None


def tail(manifest: dict[str, Any]) -> str:
    """The donor of the network's last block."""
    name: str = manifest["selected"]["blocks"][-1]["donor"]
    return name


def zoo_of(manifest: dict[str, Any], spec: str | None = None) -> Zoo:
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


def teacher_named(teacher: str, manifest: dict[str, Any]) -> str | None:
    """The name of the donor that teaches, None where nobody does."""
    if teacher == NOBODY:
        return None
    return tail(manifest) if teacher == TAIL else teacher


def open_teacher(teacher: str, manifest: dict[str, Any], spec: str | None, data: TrainingData) -> nn.Module | None:
    """The donor of the bundle's zoo, or of the one that `spec` names, as a teacher; None where nobody teaches.

    Raises UsageError where it is unknown or cannot teach these classes.
    """
    name = teacher_named(teacher, manifest)
    if name is None:
        return None
    try:
        donor = zoo_of(manifest, spec)[name]
    except DercError as error:
        raise UsageError(
            f"the teacher {name} cannot be had ({error}): give its zoo with --zoo, or --teacher none"
        ) from error
    return teacher_of(donor, data.classes)
