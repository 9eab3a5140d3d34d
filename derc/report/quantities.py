"""Numbers as people read them: three significant digits, a unit, and a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

DASH = "–"
THIN = "\N{NARROW NO-BREAK SPACE}"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def known(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any, digits: int = 3) -> str:
    """`digits` significant digits, in exponent form only below 1e-4 or from 1e7."""
    if not known(value):
        return DASH
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    value = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(value)))
    text = f"{value:.{max(0, digits - 1 - magnitude)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: Any) -> str:
    """A number of things with its SI prefix: 11.7 M."""
    if not known(value):
        return DASH
    for scale, prefix in PREFIXES:
        if abs(value) >= 0.9995 * scale:
            return f"{plain(value / scale)}{THIN}{prefix}"
    return plain(value) if value != int(value) else str(int(value))


def whole(value: Any) -> str:
    """A number of things to the last digit, in groups of three."""
    return f"{round(value):,}".replace(",", THIN) if known(value) else DASH


def milliseconds(value: Any) -> str:
    """A latency given in milliseconds, in µs, ms or s."""
    if not known(value):
        return DASH
    if 0 < abs(value) < 0.01:
        return f"{plain(value * 1e3)}{THIN}µs"
    return f"{plain(value / 1e3)}{THIN}s" if abs(value) >= 1e4 else f"{plain(value)}{THIN}ms"


def interval(bounds: Any) -> str:
    """A confidence interval of two latencies in milliseconds: 1.81 to 1.88 ms."""
    if not bounds or len(bounds) != 2 or not all(map(known, bounds)):
        return DASH
    return (
        f"{plain(bounds[0])} to {milliseconds(bounds[1])}"
        if bounds[1] < 1e4
        else " to ".join(map(milliseconds, bounds))
    )


def seconds(value: Any) -> str:
    """A duration given in seconds, in ms, s or min."""
    if not known(value):
        return DASH
    if abs(value) < 1:
        return f"{plain(value * 1e3, 2)}{THIN}ms"
    return f"{value:.1f}{THIN}s" if value < 120 else f"{int(value // 60)}{THIN}min {int(value % 60):02d}{THIN}s"


def percent(value: Any) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}{THIN}%" if known(value) else DASH


def megabytes(value: Any) -> str:
    """An amount of memory given in MB."""
    return f"{plain(value)}{THIN}MB" if known(value) else DASH


def ratio(value: Any) -> str:
    """A factor with two decimals: 1.07 ×."""
    return f"{value:.2f}{THIN}×" if known(value) else DASH


FILTERS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (plain, count, whole, milliseconds, interval, seconds, percent, megabytes, ratio)
}
