"""Random changes of training images that keep what they show; none unless asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from derc.artifacts import Array
from derc.errors import UsageError

KNOWN = "flip, crop=PIXELS, zoom=SHARE, and RandAugment as timm writes it, such as rand-m9-mstd0.5"


@dataclass(frozen=True)
class Augmentation:
    """Mirrored (`flip`) with probability 1/2; shifted by up to `crop` pixels, the border reflected; zoomed into.

    `zoom` is the least share of the image's area that stays in view, 1 for all of it. `policy` is a RandAugment policy
    in timm's words (Cubuk et al. 2019).
    """

    flip: bool = False
    crop: int = 0
    zoom: float = 1.0
    policy: str = ""

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """From ``flip,crop=4,zoom=0.6,rand-m9-mstd0.5``, any part left out; raises UsageError."""
        found: dict[str, Any] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = word.partition("=")
            try:
                match key:
                    case "none":
                        continue
                    case "flip" if not value:
                        found["flip"] = True
                    case "crop" if int(value) >= 0:
                        found["crop"] = int(value)
                    case "zoom" if 0 < float(value) <= 1:
                        found["zoom"] = float(value)
                    case _ if word.startswith("rand-"):
                        _policy(word)
                        found["policy"] = word
                    case _:
                        raise ValueError(word)
            except (ValueError, AssertionError, KeyError) as error:
                raise UsageError(f"--augment {word!r} is unknown: give {KNOWN}") from error
        return cls(**found)

    def __call__(self, images: Array, rng: np.random.Generator) -> Array:
        """(n, H, W, C) uint8 changed at random by `rng`; every image on its own."""
        if self.flip:
            chosen = rng.random(len(images)) < 0.5
            images = np.where(chosen[:, None, None, None], images[:, :, ::-1], images)
        if self.crop:
            images = self._shifted(images, rng)
        if self.zoom < 1 or self.policy:
            with _seeded(rng):
                images = np.stack([self._redrawn(image, rng) for image in images])
        return np.ascontiguousarray(images)

    def _shifted(self, images: Array, rng: np.random.Generator) -> Array:
        size, (height, width) = self.crop, images.shape[1:3]
        around = ((0, 0), (size, size), (size, size), (0, 0))
        padded = np.pad(images, around, mode="reflect" if size < min(height, width) else "edge")
        corners = rng.integers(0, 2 * size + 1, (len(images), 2))
        return np.stack([one[y : y + height, x : x + width] for one, (y, x) in zip(padded, corners, strict=True)])

    def _redrawn(self, image: Array, rng: np.random.Generator) -> Array:
        """What PIL does to one image (H, W, C)."""
        from PIL import Image

        height, width, channels = image.shape
        drawn = Image.fromarray(image if channels == 3 else np.repeat(image, 3, axis=2))
        if self.zoom < 1:
            share = rng.uniform(self.zoom, 1) ** 0.5
            x, y = rng.random(2) * (1 - share)
            box = (x * width, y * height, (x + share) * width, (y + share) * height)
            drawn = drawn.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if self.policy:
            drawn = _policy(self.policy)(drawn)
        return np.asarray(drawn if channels == 3 else drawn.convert("L"), np.uint8).reshape(height, width, channels)


@cache
def _policy(text: str) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(text, {})


@contextmanager
def _seeded(rng: np.random.Generator) -> Iterator[None]:
    """The global random states of Python and numpy, which timm draws from, set by `rng` and restored afterwards."""
    before, numpys = random.getstate(), np.random.get_state()
    random.seed(int(rng.integers(2**32)))
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)
