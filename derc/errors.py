"""One error tree; every class carries the exit code that the command line returns.

DercError                    1  a bug, or a case nobody thought of
├── UsageError               2  wrong option, file, zoo or data
├── InfeasibleError          3  nothing fits the budget
├── ParityError              4  module, ONNX and engine disagree
│   └── PrecisionError       4  a lower precision gives NaN or overflows
├── MissingDependencyError   5  a package, runtime or device is absent
├── UnstableError            6  the measurement did not settle
├── OverBudgetError          7  built, but slower than the budget
├── IntegrityError           8  a stored or shipped file is not what was written
└── BuildError               9  a runtime crashed, hung or ran out of memory while building an engine
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class DercError(Exception):
    """Base of all errors that derc raises on purpose; the message is one sentence with cause and remedy."""

    exit_code: ClassVar[int] = 1


class UsageError(DercError):
    """The request cannot be understood or its inputs cannot be read."""

    exit_code = 2


class InfeasibleError(DercError):
    """No assembly satisfies the budgets; the message names the best that is achievable."""

    exit_code = 3


class ParityError(DercError):
    """Two forms of the same network give different outputs."""

    exit_code = 4


class PrecisionError(ParityError):
    """A network computed in a lower precision gives NaN or infinity where float32 does not."""


class MissingDependencyError(DercError):
    """A package, runtime or device that the request needs is not on this machine."""

    exit_code = 5


class UnstableError(DercError):
    """A latency did not settle within its time limit."""

    exit_code = 6


class OverBudgetError(DercError):
    """The network was built and measured, and it is over the budget."""

    exit_code = 7


class IntegrityError(DercError):
    """A file's content does not match its recorded digest, or a bundle is incomplete."""

    exit_code = 8


class BuildError(DercError):
    """A runtime crashed, hung or ran out of memory while building one engine."""

    exit_code = 9


def suggest(word: str, known: Iterable[str]) -> str:
    """A clause `; did you mean 'x'?` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
