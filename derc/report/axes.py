"""Linear and logarithmic axes with round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_FROM = 12.0


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to the pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of `value`, to a tenth."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (here - low) / (high - low), 1)

    @property
    def ticks(self) -> list[float]:
        """Four to ten round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        else:
            step = _step((self.high - self.low) / 6)
            first = math.ceil(self.low / step - 1e-9)
            marks = [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [round(mark, 12) for mark in marks if self.low <= mark * (1 + 1e-9) and mark <= self.high * (1 + 1e-9)]


def fit(values: Sequence[float], start: float, end: float, *, linear: bool = False) -> Axis:
    """An axis around `values` with a margin, logarithmic where they are positive and span a factor of 12."""
    low, high = min(values), max(values)
    if not linear and low > 0 and high / low >= LOG_FROM:
        room = (high / low) ** 0.06
        return Axis(low / room, high * room, start, end, log=True)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = max(0.0, low - margin) if low >= 0 else low - margin
    return Axis(bottom, high + margin, start, end)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * (1 - 1e-9))
