"""Local Hugging Face data sets, as `datasets.save_to_disk` writes them: no network, and no code of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from derc.artifacts import Array
from derc.errors import MissingDependencyError, UsageError
from derc.images import Size, Source, fitted

ORDER = ("validation", "test", "train")
"""Which split a compile takes of several."""


def open_parts(path: Path) -> dict[str, Any]:
    """The data set at `path` by its splits' names, or by "" where it has none.

    Raises UsageError where it is none, MissingDependencyError without the package datasets.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            'hf: data needs the package datasets, which is not installed: pip install "derc[train]"'
        ) from error
    if not path.is_dir():
        raise UsageError(f"data folder {path} does not exist or is not a folder")
    try:
        found = load_from_disk(str(path.absolute()))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a data set that save_to_disk of datasets wrote ({error})") from error
    return dict(found) if isinstance(found, DatasetDict) else {"": found}


@dataclass(frozen=True)
class Rows:
    """One split; `size` is (C, H, W)."""

    dataset: Any
    path: Path
    size: Size

    @cached_property
    def columns(self) -> tuple[str, str | None]:
        """Names of the column of images, and of that of class indices, if any."""
        return columns_of(self.dataset.features, self.path)

    @property
    def classes(self) -> tuple[str, ...] | None:
        _, label = self.columns
        if label is None:
            return None
        names = getattr(self.dataset.features[label], "names", None)
        return tuple(names) if names else tuple(str(n) for n in range(int(self.labels.max()) + 1))

    @cached_property
    def labels(self) -> Array:
        """(N,) int64; raises UsageError where a row has none."""
        _, label = self.columns
        if label is None:
            raise UsageError(f"{self.path} has no column of class indices: name it label")
        found = np.array([-1 if row is None else row for row in self.dataset[label]], np.int64)
        if (found < 0).any():
            raise UsageError(f"{self.path}: row {int((found < 0).argmax())} has no label: remove it")
        return found

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Array) -> Array:
        """(n, H, W, C) uint8, decoded now; raises UsageError where one is no image."""
        image, _ = self.columns
        try:
            rows = [self.dataset[int(index)][image] for index in indices]
            return np.stack([fitted(row, self.size) for row in rows])
        except (OSError, SyntaxError, ValueError, AttributeError) as error:
            raise UsageError(f"{self.path}: an image cannot be read ({error}): replace or remove it") from error


def columns_of(features: Mapping[str, Any], path: Path) -> tuple[str, str | None]:
    """Columns of images and of class indices: by their types, an integer one by its name; raises UsageError."""
    from datasets import ClassLabel, Image

    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    if not images:
        raise UsageError(f"{path} has no column of images, only {', '.join(features)}: cast one to datasets.Image")
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    labels += [name for name in ("label", "labels", "y") if str(getattr(features.get(name), "dtype", "")).count("int")]
    return images[0], labels[0] if labels else None


def hf_source(path: Path, size: Size) -> Source:
    """A data set for a compile: its split `validation`, else `test`, else `train`, else the only one."""
    parts = open_parts(path)
    name = next((name for name in ORDER if name in parts), next(iter(parts)))
    rows = Rows(parts[name], path, size)
    labels = None if rows.columns[1] is None else rows.labels
    return Source(len(rows), rows.classes, labels, rows.read)
