"""The embedded zoo and its data: 1797 handwritten digits, scans of 8 × 8 pixels (UCI, Alpaydin and Kaynak 1998).

`digits.npz` has x (1797, 8, 8, 1) uint8, the scans' 0 to 16 scaled to 0 to 255, and y (1797,).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from derc.artifacts import Array

FOLDER = Path(__file__).parent
CLASSES = tuple(str(digit) for digit in range(10))
SIZES = {"train": 900, "probe": 300, "validation": 300, "heldout": 297}
SEED = 20220417


def load_all() -> tuple[Array, Array]:
    """All images (1797, 8, 8, 1) uint8 and labels (1797,) int64."""
    with np.load(FOLDER / "digits.npz", allow_pickle=False) as arrays:
        return arrays["x"], arrays["y"].astype(np.int64)


def indices(split: str) -> Array:
    """The images of `split` by number: the splits are fixed, disjoint, and hold the classes in even shares."""
    labels = load_all()[1]
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for digit in range(10):
        members = order[labels[order] == digit]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    ranked = np.argsort(place, kind="stable")
    start = sum(size for name, size in list(SIZES.items())[: list(SIZES).index(split)])
    found: Array = ranked[start : start + SIZES[split]]
    return found


def load_split(split: str) -> tuple[Array, Array]:
    """Images (n, 8, 8, 1) uint8 and labels (n,) int64 of train, probe, validation or heldout."""
    images, labels = load_all()
    chosen = indices(split)
    return images[chosen], labels[chosen]
