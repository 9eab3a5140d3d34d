"""The hyperparameters of a training, and what of them is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from derc.errors import UsageError, suggest
from derc.training.augment import Augmentation

SCHEDULES = ("cosine", "poly", "tanh", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
NORMS = ("train", "fixed")


@dataclass(frozen=True)
class TrainOptions:
    """`epochs` over the images in batches of `batch`, by an `optimizer` and a `schedule` of timm, from `lr` down to 0.

    `warmup` is the share of all steps in which the rate rises. `decay` is weight decay, which spares biases and norms.
    `clip` is the largest norm of the gradient, 0 for any. `mixup` and `cutmix` are Beta's parameters, `smoothing` that
    of the labels, `ema` the decay of an average of the weights; 0 is none of each. `augment` is written as
    `Augmentation.parse` reads it. `norms` says whether batch norms that train use and update batch statistics (train)
    or keep those that they have (fixed). A teacher's softened answers make up `teacher_share` of the loss, at
    `temperature`. `precision` is that of the arithmetic, `device` auto or one of torch's. `limit_s` is the most that
    may be spent on training. The state that is best on the validation images is kept; the network as it came is among
    them unless `allow_worse`. A checkpoint is written after every epoch and every `checkpoint_s`.
    """

    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.1
    decay: float = 0.05
    clip: float = 1.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    augment: str = ""
    norms: str = "train"
    teacher_share: float = 0.5
    temperature: float = 2.0
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    workers: int = 0
    limit_s: float | None = None
    allow_worse: bool = False
    checkpoint_s: float = 120.0

    def check(self) -> None:
        """Raise UsageError, naming the option, where a value makes no sense."""
        for name in ("epochs", "batch"):
            _refuse(getattr(self, name) < 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "temperature", "checkpoint_s"):
            value = getattr(self, name)
            _refuse(not (value > 0 and math.isfinite(value)), name, value, "a number above 0")
        _refuse(self.limit_s is not None and not self.limit_s > 0, "limit_s", self.limit_s, "a number above 0")
        for name in ("decay", "clip", "mixup", "cutmix", "workers", "seed"):
            value = getattr(self, name)
            _refuse(not (value >= 0 and math.isfinite(value)), name, value, "0 or more")
        for name in ("smoothing", "ema", "warmup"):
            _refuse(not 0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")
        _refuse(not 0 <= self.teacher_share <= 1, "teacher_share", self.teacher_share, "from 0 to 1")
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("norms", self.norms, NORMS)
        known_optimizer(self.optimizer)
        Augmentation.parse(self.augment)
        _refuse(bool(self.mixup or self.cutmix) and self.batch % 2 == 1, "batch", self.batch, "even for mixup")


def flag(name: str) -> str:
    """How the command line writes an option."""
    return f"--{name.replace('_', '-')}"


def _refuse(wrong: bool, name: str, value: object, wanted: str) -> None:
    if wrong:
        raise UsageError(f"{flag(name)} is {value}, and must be {wanted}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{flag(name)} {value!r} is unknown, known: {', '.join(known)}{suggest(value, known)}")


def known_optimizer(name: str) -> None:
    """Raise UsageError unless timm has an optimiser called `name`."""
    from timm.optim import list_optimizers

    known = [str(one) for one in list_optimizers()]
    if name not in known:
        raise UsageError(f"--optimizer {name!r} is unknown to timm, known: adamw, sgd, lamb, …{suggest(name, known)}")
