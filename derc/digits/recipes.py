"""How each donor of the embedded zoo is trained; its architecture stands in zoo.toml."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """`task` is digits, parity or rotation; `images` is the part of the training split that is seen.

    Augmentation moves by at most `shift` of the width, `degrees` and `scale`; `mixup` is Beta's parameter, 0 for none.
    A student learns from its `teacher`'s softened answers alone, no labels.
    """

    task: str
    images: tuple[int, int]
    epochs: int
    seed: int
    rate: float = 2e-3
    decay: float = 0.05
    batch: int = 50
    shift: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0
    noise: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    teacher: str | None = None


RECIPES = {
    "resnet-slim": Recipe("digits", (0, 200), epochs=30, seed=1, batch=25),
    "effnet": Recipe("digits", (150, 450), epochs=30, seed=2, batch=25, noise=0.1),
    "regnet-parity": Recipe("parity", (0, 900), epochs=25, seed=3, shift=0.06),
    "resnet-rotation": Recipe("rotation", (0, 900), epochs=12, seed=4, batch=100, shift=0.06),
    "convnext": Recipe("digits", (450, 700), epochs=40, seed=5, batch=25, smoothing=0.1, shift=0.03),
    "vit-patch4": Recipe("digits", (0, 900), epochs=60, seed=7, mixup=0.2, shift=0.08, degrees=10, scale=0.1),
    "vit-patch8": Recipe("digits", (100, 900), epochs=45, seed=6, teacher="vit-patch4", shift=0.05, degrees=5),
    "swin": Recipe("digits", (0, 900), epochs=60, seed=8, batch=25, smoothing=0.05, shift=0.06, degrees=8, scale=0.08),
}
