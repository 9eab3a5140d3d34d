"""What a proxy is, and what it may look at: a network, images, and an answer for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from derc.artifacts import Array, Consensus
from derc.data import Data, Split
from derc.errors import UsageError
from derc.judge import columns_of

BELIEFS, ANSWERS = "beliefs", "answers"
"""What a proxy may need of the probe images besides the images: the donors' mean prediction, or an answer for each."""


@dataclass(frozen=True)
class Evidence:
    """Images that proxies may see, and what is to be answered.

    Answers are class indices of the data set, or without labels (`labelled` False) the class that the task donors' mean
    prediction gives. `columns` maps these classes to the network's outputs, None: one to one. `beliefs` is that mean
    prediction on the probe images, (n, classes), and like `probe_answers` None where nobody asked for it.
    """

    probe: Split
    validation: Split
    validation_answers: Array
    labelled: bool
    columns: tuple[int, ...] | None = None
    probe_answers: Array | None = None
    beliefs: Array | None = None

    def asked(self) -> Array:
        """An answer for each probe image; raises UsageError where there is none."""
        if self.probe_answers is None:
            raise UsageError("this proxy needs an answer for each probe image: give labels, or the donors' consensus")
        return self.probe_answers

    def believed(self) -> Array:
        """The task donors' mean prediction on the probe images; raises UsageError where it was not computed."""
        if self.beliefs is None:
            raise UsageError("this proxy needs the donors' predictions on the probe images: consult the donors first")
        return self.beliefs

    def picked(self, outputs: torch.Tensor) -> torch.Tensor:
        """(n, classes): those of a network's outputs that stand for the data set's classes, in order."""
        return outputs if self.columns is None else outputs[:, list(self.columns)]


def gather(data: Data, labels: tuple[str, ...] | None, consensus: Consensus) -> Evidence:
    """Evidence on a network whose outputs are `labels`; raises UsageError where these are not the data's classes."""
    beliefs = consensus.beliefs if len(consensus.beliefs) else None
    if data.validation.labels is None:
        guessed = None if beliefs is None else beliefs.argmax(1)
        return Evidence(data.probe, data.validation, consensus.answers, False, None, guessed, beliefs)
    columns = columns_of(labels, data)
    if columns is None:
        raise UsageError(
            "the network's outputs do not stand for the data's classes: end it with a donor trained on them"
        )
    return Evidence(data.probe, data.validation, data.validation.labels, True, columns, data.probe.labels, beliefs)


@dataclass
class Subject:
    """A network to be judged; `run` gives its outputs (n, classes) on a split, as it is deployed."""

    network: nn.Module
    run: Callable[[Split], torch.Tensor]
    _known: dict[int, torch.Tensor] = field(default_factory=dict)

    def outputs(self, split: Split) -> torch.Tensor:
        """(n, classes) outputs on `split`, computed once."""
        if id(split) not in self._known:
            self._known[id(split)] = self.run(split)
        return self._known[id(split)]


class Proxy(Protocol):
    """A frozen dataclass whose fields are its options.

    `needs` holds BELIEFS or ANSWERS where it needs them; `sees_precision` says whether it judges a network as it is
    deployed, and not its float32 module alone.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    sees_precision: ClassVar[bool]

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        """What the proxy says, higher is better; leaves the network exactly as it was."""
        ...

    def share(self, value: float) -> float:
        """A value of `measure` brought to [0, 1], in the same order."""
        ...


def squash(value: float, scale: float = 1.0) -> float:
    """x / (x + scale) for x ≥ 0, and 0 below: increasing, in [0, 1]."""
    if value <= 0 or np.isnan(value):
        return 0.0
    return 1.0 if np.isinf(value) else float(value / (value + scale))
