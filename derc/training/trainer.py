"""The training loop: from a network and labelled images to the state that is best on the validation images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from derc.data import Split
from derc.errors import UsageError
from derc.training.augment import Augmentation
from derc.training.checkpoint import Work
from derc.training.checks import check_labels, check_outputs, out_of_memory
from derc.training.examples import Batches, Examples, as_examples, in_order
from derc.training.freeze import Trains, everything, prepare, to_train
from derc.training.loss import Loss, mixing, seeded
from derc.training.options import TrainOptions
from derc.training.outcome import Row, Scored, Trained
from derc.training.runner import Runner, open_runner

PARTS = ("loss", "label_loss", "teacher_loss", "right", "seen")
"""What is summed over the batches of an epoch."""
T = TypeVar("T")
State = dict[str, Tensor]


def train(
    network: nn.Module,
    images: Split | Examples,
    validation: Split | Examples,
    options: TrainOptions | None = None,
    *,
    trains: Trains = everything,
    teacher: nn.Module | None = None,
    columns: tuple[int, ...] | None = None,
    work: Work | None = None,
    say: Callable[[str], None] = lambda _: None,
    record: Callable[[Row], None] = lambda _: None,
) -> Trained:
    """Train `network`, in place, on labelled `images` of its input size; the state that is best on `validation` stays.

    `columns` picks the output that stands for each class, where they are not the outputs in order. `teacher` takes the
    same images in [0, 1] and gives one logit per class. An opened `work` folder is gone on from, and kept up to date.
    `say` gets what a user should know, `record` each row of the log. The same arguments give the same weights, bit for
    bit on one thread of a processor, whether interrupted or not.

    Raises UsageError for options and labels that make no sense, a loss that is no number, and too little memory for
    one image; MissingDependencyError where the precision needs Accelerate.
    """
    options = options or TrainOptions()
    options.check()
    trainer = Trainer(
        network, as_examples(images), as_examples(validation), options, trains, teacher, columns, work, say, record
    )
    return trainer.run()


@dataclass
class Trainer:
    """One training; see `train`. A subclass may give the images another meaning than their labels."""

    rate: ClassVar[str] = "--lr"

    network: nn.Module
    examples: Examples
    validation: Examples
    options: TrainOptions
    trains: Trains
    teacher: nn.Module | None
    columns: tuple[int, ...] | None
    work: Work | None
    say: Callable[[str], None]
    record: Callable[[Row], None]
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    stopped: bool = False
    rows: list[Row] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def run(self) -> Trained:
        self._set_up()
        self._resume()
        self.clock = time.perf_counter() - self.seconds
        while self.step < self.total and not self.stopped:
            self._epoch()
        self.seconds = self._time() if self.step else 0.0
        return self._result()

    def _set_up(self) -> None:
        options = self.options
        self.runner: Runner = open_runner(options.precision, options.device)
        self._check_images()
        even = bool(options.mixup or options.cutmix)
        augmentation = Augmentation.parse(options.augment)
        self.batches = Batches(
            self.examples, options.batch, options.seed, augmentation, even=even, share=self.runner.share
        )
        self.total = options.epochs * self.batches.per_epoch
        self.micro = self.batches.size
        self.network.to(self.runner.device)
        self.parameters = prepare(self.network, self.trains)
        self.classes = self._fitting(self._check_outputs)
        self._optimise()
        share = options.teacher_share if self.teacher is not None else 0.0
        self.loss = Loss(options.smoothing, share, options.temperature)
        self.mix = mixing(options.mixup, options.cutmix, options.smoothing, self.classes)
        if self.teacher is not None:
            self.teacher.to(self.runner.device).eval()
        self.live = self.runner.wrap(self.network)

    def _check_images(self) -> None:
        check_labels(self.examples, self.validation)

    def _check_outputs(self) -> int:
        """The number of outputs that are trained."""
        labels = np.concatenate([self.examples.labels, self.validation.labels])
        classes = int(labels.max()) + 1 if self.columns is None else len(self.columns)
        return check_outputs(self.network, self.examples, self.columns, classes, self.runner.device)

    def _optimise(self) -> None:
        """Optimiser, schedule and average, as timm makes them."""
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        options = self.options
        self.optimizer = create_optimizer_v2(
            self.network, opt=options.optimizer, lr=options.lr, weight_decay=options.decay
        )
        warmup = min(round(options.warmup * self.total), self.total - 1)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            sched=options.schedule,
            num_epochs=self.total,
            warmup_epochs=warmup,
            warmup_lr=options.lr / max(1, warmup),
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        self.average = ModelEmaV3(self.network, decay=options.ema, use_warmup=True) if options.ema else None

    def _resume(self) -> None:
        """Go on from the work folder's state, or begin: the network as it came is the first best state."""
        state = self.work.load() if self.work else None
        if state is None:
            self.before = self._score(self.network)
            if not math.isfinite(self.before.loss):
                raise UsageError("the network gives NaN or infinity before any training: leave out the donor that does")
            self.best, self.best_state, self.kept, self.epoch = self.before, self._state(self.network), "before", 0
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.runner.scaler is not None:
            self.runner.scaler.load_state_dict(state["scaler"])
        self.before, self.best = Scored(**state["before"]), Scored(**state["best"])
        self.best_state = state["best_state"]
        for name in ("step", "images", "seconds", "stopped", "rows", "sums", "micro", "kept", "epoch"):
            setattr(self, name, state[name])
        self.say(f"going on from step {self.step} of {self.total}")

    def _save(self) -> None:
        if self.work is not None and self.runner.main:
            self.seconds = self._time()
            self.work.save(
                {
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "average": None if self.average is None else self.average.module.state_dict(),
                    "scaler": None if self.runner.scaler is None else self.runner.scaler.state_dict(),
                    "before": asdict(self.before),
                    "best": asdict(self.best),
                    "best_state": self.best_state,
                    **{name: getattr(self, name) for name in ("step", "images", "seconds", "stopped", "rows", "sums")},
                    **{name: getattr(self, name) for name in ("micro", "kept", "epoch")},
                }
            )
        self.saved = time.perf_counter()
        self.runner.wait()

    def _time(self) -> float:
        return time.perf_counter() - self.clock

    def _epoch(self) -> None:
        """The rest of an epoch, its row in the log and a checkpoint."""
        self.saved = time.perf_counter()
        to_train(self.network, self.trains, self.options.norms)
        end = (self.step // self.batches.per_epoch + 1) * self.batches.per_epoch
        for images, labels in self.batches.stream(self.step, end, self.options.workers):
            self._step(images.to(self.runner.device), labels.to(self.runner.device))
            if self._out_of_time() and self.step < self.total:
                self.stopped = True
                break
            late = time.perf_counter() - self.saved > self.options.checkpoint_s
            if late and self.step < end and self.runner.share.world == 1:
                self._save()
        self._close_epoch()
        self._save()

    def _out_of_time(self) -> bool:
        if self.options.limit_s is None:
            return False
        late = torch.tensor(float(self._time() >= self.options.limit_s), device=self.runner.device)
        return bool(self.runner.total(late) > 0)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One step of the optimiser on a batch; where memory runs out, with half as many images at a time."""
        self.schedule.step_update(self.step)
        with seeded(self.options.seed, self.step, self.runner.share.rank, self.runner.device):
            mixed, targets = (images, labels) if self.mix is None else self.mix(images, labels)
            sums = self._gradients(mixed, targets)
        if not math.isfinite(sums["loss"]):
            epoch = self.step // self.batches.per_epoch + 1
            raise UsageError(
                f"the loss is {sums['loss']} at step {self.step + 1} (epoch {epoch}): "
                f"lower {self.rate}, for instance to {self.options.lr / 10:g} (it is {self.options.lr:g})"
            )
        self.runner.step(self.optimizer, self.parameters, self.options.clip)
        self.step += 1
        if self.average is not None:
            self.average.update(self.network, self.step)
        self.images += self.batches.size
        self.sums = {name: self.sums[name] + sums[name] for name in PARTS}

    def _gradients(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        """The gradients of the mean loss of a batch, `micro` images at a time, and its sums."""

        def accumulate() -> dict[str, float]:
            self.optimizer.zero_grad()
            return self._accumulated(images, targets)

        return self._fitting(accumulate)

    def _fitting(self, work: Callable[[], T]) -> T:
        """What `work` gives, tried again with fewer images at a time where memory runs out."""
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._halve()

    def _halve(self) -> None:
        if self.micro == 1:
            raise UsageError("there is not enough memory to train this network on one image: train on another device")
        if self.runner.share.world > 1:
            raise UsageError("one of the processes ran out of memory: lower --batch")
        self.micro = -(-self.micro // 2)
        self.network.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say(
            f"out of memory: {self.micro} images at a time from here on, in batches of {self.batches.size} as before"
        )

    def _accumulated(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        sums = dict.fromkeys(PARTS, 0.0)
        whole = self.batches.size / self.runner.share.world
        for part, wanted in zip(images.split(self.micro), targets.split(self.micro), strict=True):
            with self.runner.context():
                outputs = self._picked(self.live(part))
            loss, labels, teacher = self.loss(outputs, wanted, self._taught(part))
            self.runner.backward(loss * (len(part) / whole))
            answers = wanted.argmax(1) if wanted.dim() == 2 else wanted
            values = (loss, labels, teacher if teacher is not None else torch.zeros(()))
            found = [float(value.detach()) * len(part) for value in values]
            found += [float((outputs.argmax(1) == answers).sum()), float(len(part))]
            sums = {name: sums[name] + value for name, value in zip(PARTS, found, strict=True)}
        return sums

    def _picked(self, outputs: Tensor) -> Tensor:
        return outputs if self.columns is None else outputs[:, list(self.columns)]

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        with self.runner.context():
            taught: Tensor = self.teacher(images)
        return taught

    def _close_epoch(self) -> None:
        """The validation scores of the weights and of their average, and the row of the log."""
        epoch = -(-self.step // self.batches.per_epoch)
        scored = self._score(self.network)
        averaged = None if self.average is None else self._score(self.average.module)
        self._challenge(scored, self.network, "weights", epoch)
        if averaged is not None and self.average is not None:
            self._challenge(averaged, self.average.module, "average", epoch)
        total = self.runner.total(torch.tensor([self.sums[name] for name in PARTS], device=self.runner.device)).tolist()
        loss, labels, teacher, right, seen = (float(value) for value in total)
        row: Row = {
            "epoch": epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss / max(seen, 1),
            "label_loss": labels / max(seen, 1),
            "teacher_loss": teacher / max(seen, 1) if self.teacher is not None else None,
            "accuracy": right / max(seen, 1) if self.mix is None else None,
            "validation_loss": scored.loss,
            "validation_accuracy": scored.accuracy,
            "average_accuracy": averaged.accuracy if averaged else None,
            "images": self.images,
            "seconds": round(self._time(), 3),
        }
        self.sums = dict.fromkeys(PARTS, 0.0)
        self.rows.append(row)
        self.record(row)

    def _challenge(self, scored: Scored, network: nn.Module, kind: str, epoch: int) -> None:
        """Keep this state where it is better than the best so far."""
        first = self.kept == "before" and self.options.allow_worse
        if scored.rank > self.best.rank or (first and math.isfinite(scored.loss)):
            self.best, self.best_state, self.kept, self.epoch = scored, self._state(network), kind, epoch

    def _state(self, network: nn.Module) -> State:
        return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def _score(self, network: nn.Module) -> Scored:
        """Accuracy and cross entropy on the validation images, in eval mode."""
        network.eval()
        return self._fitting(lambda: self._scored(network))

    def _scored(self, network: nn.Module) -> Scored:
        sums = torch.zeros(3, dtype=torch.float64)
        for images, labels in self._validation():
            outputs = self._picked(network(images.to(self.runner.device))).float().cpu()
            right = (outputs.argmax(1) == labels).sum()
            sums += torch.tensor([float(right), float(F.cross_entropy(outputs, labels, reduction="sum")), len(labels)])
        right, loss, count = self.runner.total(sums.to(self.runner.device)).tolist()
        return Scored(right / count, loss / count)

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        return in_order(self.validation, min(self.micro, self.options.batch), self.runner.share)

    def _result(self) -> Trained:
        self.network.load_state_dict(self.best_state)
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return Trained(
            self.network.cpu().eval(),
            tuple(self.rows),
            self.before,
            self.best,
            self.kept,
            self.epoch,
            self.step,
            self.images,
            self.seconds,
            self.micro,
            self.stopped,
            self.runner.device.type,
            self.runner.share.world,
        )
