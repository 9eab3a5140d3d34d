"""The log of a search: each network that was evaluated or matched, in order, and what was believed of it before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from derc.artifacts import Scores, StitchedAssembly, digest

if TYPE_CHECKING:
    from derc.pipeline import Timings
    from derc.store import Store

FILE = "evaluations.jsonl"
"""Where a bundle keeps it."""
DONOR, PRIOR, MEAN, DRAW = "donor", "prior", "mean", "draw"
"""What may have proposed a network: it is a donor, or the best before anything was evaluated (a diverse design), by the
posterior mean, or in a draw from the posterior."""
MATCH: Literal["match"] = "match"


@dataclass(frozen=True)
class Entry:
    """One evaluation: its `number` from 1 and its `round` from 0, where the donors are round 0.

    `predicted` and `deviation` are the mean and standard deviation of the score that were believed before. `score` is
    None for a network that could not be built, and `failed` says why. `seconds` are those that stitches and proxies
    took when they were first computed, None where that is not known.
    """

    number: int
    round: int
    by: str
    assembly: str
    predicted: float | None
    deviation: float | None
    score: float | None
    seconds: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Rematch:
    """What matching without labels did to a network that was evaluated before, after `round`; `number` counts on.

    `images` were shown in `seconds`, those that the training took when it was first done. The agreement with the
    `teacher` is that on the validation images; the `score` is that of the matched network, which is `kept` unless it is
    below the one `score_before`.
    """

    number: int
    round: int
    assembly: str
    teacher: str
    images: int
    agreement_before: float
    agreement: float
    score_before: float
    score: float
    kept: bool
    seconds: float
    by: Literal["match"] = field(default=MATCH)


Line = Entry | Rematch


def kept_seconds(
    store: Store, stitched: StitchedAssembly, scores: Scores, seconds: float, watch: Timings
) -> float | None:
    """What the evaluation took when it was first made: `seconds` now, or what the store knows of one that it gave.

    None where the store gave it and does not know, as after an interruption between the two.
    """
    key = digest(["evaluated"], stitched, scores)
    if all(watch.reused.values()):
        known = store.get_bytes(key)
        return None if known is None else float(known)
    store.put_bytes(key, repr(round(seconds, 6)).encode(), note=f"seconds of {stitched.assembly}")
    return round(seconds, 6)


def lines(entries: Iterable[Line]) -> str:
    """JSON, one evaluation or matching a line."""
    return "".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in entries)


def read(text: str) -> tuple[Line, ...]:
    """Inverse of `lines`."""
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(Rematch(**row) if row["by"] == MATCH else Entry(**row) for row in rows)
