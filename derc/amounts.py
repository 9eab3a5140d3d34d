"""How much of something there is to be: a number of images, or of seconds."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """How much matching there is: so many images shown, or so many seconds; 0 of both: none."""

    images: int = 0
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.images > 0 or self.seconds > 0


def amount(text: str) -> Amount:
    """``3000`` images, or ``30s`` seconds; raises ValueError for anything else and for what is negative."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s?)\s*", text)
    if found is None or (not found[2] and "." in found[1]):
        raise ValueError("must be a number of images, such as 3000, or of seconds, such as 30s; 0 is none")
    return Amount(seconds=float(found[1])) if found[2] else Amount(images=int(found[1]))
