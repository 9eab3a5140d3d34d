"""Colours that stay distinct for colour-blind readers: Okabe and Ito 2008 for sets, viridis for magnitudes."""

from __future__ import annotations

SETS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f")
RAMP = (
    "#440154",
    "#472d7b",
    "#3b528b",
    "#2c728e",
    "#21918c",
    "#28ae80",
    "#5ec962",
    "#addc30",
    "#fde725",
)  # viridis (Smith and van der Walt 2015) at nine even steps


def of_set(number: int | None) -> str:
    """Colour of an equivalence set; colours repeat after eight, so marks carry the set's number too."""
    return SETS[number % len(SETS)] if number is not None else "#9a9a9a"


def ink(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (WCAG 2 relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def shade(value: float) -> str:
    """Colour of a magnitude in [0, 1] on the ramp; values outside are clipped."""
    position = min(max(value, 0.0), 1.0) * (len(RAMP) - 1)
    left = min(int(position), len(RAMP) - 2)
    part = position - left
    ends = [[int(RAMP[left + k][i : i + 2], 16) for i in (1, 3, 5)] for k in (0, 1)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*ends, strict=True))
