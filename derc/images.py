"""Reading images: folders of files, npz arrays and the embedded digits, all as uint8 (H, W, C) of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from derc.artifacts import Array
from derc.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
Size = tuple[int, int, int]
Track = Callable[[Iterable[int], str, int], Iterable[int]]


@dataclass(frozen=True)
class Source:
    """Images that are decoded on demand: `read` takes indices and gives (n, H, W, C) uint8."""

    count: int
    classes: tuple[str, ...] | None
    labels: Array | None
    read: Callable[[Array], Array]


def digits_splits() -> tuple[tuple[str, ...], list[tuple[Array, Array]]]:
    """Class names, and (images, labels) of the probe, validation and held-out splits of the embedded digits."""
    from derc.digits import CLASSES, load_split

    return CLASSES, [load_split(name) for name in ("probe", "validation", "heldout")]


def folder_source(path: Path, size: Size, track: Track) -> Source:
    """Images under `path`: one folder per class, or images only, which then have no labels.

    `track` shows progress while images are read. Raises UsageError for a folder that is missing, empty or mixes the
    two, and when an image cannot be read.
    """
    if not path.is_dir():
        raise UsageError(f"data folder {path} does not exist or is not a folder")
    loose = _images_in(path, deep=False)
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    members = {folder.name: _images_in(folder, deep=True) for folder in folders}
    if loose and any(members.values()):
        raise UsageError(f"data folder {path} mixes images ({loose[0].name}, …) with class folders: move them into one")
    if not loose and not any(members.values()):
        raise UsageError(f"data folder {path} has no images ({', '.join(SUFFIXES)})")
    for name, files in members.items():
        if not loose and not files:
            raise UsageError(f"data folder {path}: the class folder {name} has no images")
    files = loose or [file for group in members.values() for file in group]
    labels = np.repeat(np.arange(len(members)), [len(group) for group in members.values()]) if not loose else None
    return Source(
        count=len(files),
        classes=None if loose else tuple(members),
        labels=labels,
        read=lambda indices: np.stack([_decode(files[i], size) for i in track(indices, "images", len(indices))]),
    )


def _images_in(folder: Path, *, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())


def _decode(file: Path, size: Size) -> Array:
    """One file's image; raises UsageError where it is none."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return fitted(opened, size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"image {file} cannot be read ({error}): replace or remove it") from error


def fitted(opened: Image.Image, size: Size) -> Array:
    """A PIL image as uint8 (H, W, C) of `size` (C, H, W): the shorter side resized to match, then the centre."""
    from PIL import Image, ImageOps

    channels, height, width = size
    image = opened.convert("RGB" if channels == 3 else "L")
    made = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(made, dtype=np.uint8).reshape(height, width, channels)


def npz_source(path: Path, size: Size) -> Source:
    """Arrays `x` (N, H, W, C) uint8 and, where there are labels, `y` (N,) of class indices in an npz file.

    Raises UsageError that says which array is wrong; pickled arrays are never loaded.
    """
    return array_source(read_npz(path), path, size)


def array_source(arrays: dict[str, Array], path: Path, size: Size, part: str = "") -> Source:
    """The arrays `x` and `y` of an npz file, or those of a part of it, such as `x_train` and `y_train`."""
    name, labelled = f"x{part}", f"y{part}"
    if name not in arrays:
        raise UsageError(
            f"{path} has no array {name}, only {', '.join(sorted(arrays)) or 'nothing'}: name the images x"
        )
    x = arrays[name]
    if x.ndim != 4 or x.dtype != np.uint8:
        raise UsageError(f"{path}: {name} must be uint8 of shape (N, H, W, C), it is {x.dtype} of shape {x.shape}")
    if 0 in x.shape:
        raise UsageError(f"{path}: {name} has no images, its shape is {x.shape}")
    if x.shape[3] not in (1, size[0]):
        raise UsageError(f"{path}: {name} has {x.shape[3]} channels, and the networks want {size[0]}")
    labels = _npz_labels(arrays.get(labelled), len(x), path, labelled)
    classes = None if labels is None else tuple(str(index) for index in range(int(labels.max()) + 1))
    return Source(len(x), classes, labels, lambda indices: resize(x[indices], size))


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an npz file by name; pickled ones are refused."""
    if not path.is_file():
        raise UsageError(f"data file {path} does not exist or is not a file")
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise UsageError(f"{path} is not a readable npz file: save x and y with numpy.savez")
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        pickled = "allow_pickle" in str(error)
        reason = "has pickled objects, which derc does not load" if pickled else "is not a readable npz file"
        raise UsageError(f"{path} {reason}: save plain arrays x and y with numpy.savez") from error


def _npz_labels(y: Array | None, count: int, path: Path, name: str) -> Array | None:
    if y is None:
        return None
    if y.shape == (count, 1):
        y = y[:, 0]
    if y.shape != (count,) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise UsageError(
            f"{path}: {name} must be {count} class indices from 0 as integers, it is {y.dtype} of shape {y.shape}"
        )
    return y.astype(np.int64)


def resize(images: Array, size: Size) -> Array:
    """(n, H, W, C) uint8 brought to `size` (C, H, W), bilinear, cropped to its aspect; one channel may become three."""
    from PIL import Image, ImageOps

    channels, height, width = size
    if images.shape[1:3] != (height, width):
        planes = [
            [ImageOps.fit(Image.fromarray(plane), (width, height), Image.Resampling.BILINEAR) for plane in planes]
            for planes in images.transpose(0, 3, 1, 2)
        ]
        images = np.stack([np.stack([np.asarray(p) for p in image], axis=-1) for image in planes])
    return np.repeat(images, channels, axis=3) if images.shape[3] != channels else images
