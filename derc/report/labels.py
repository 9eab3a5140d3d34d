"""Labels beside points, moved or left out where they would cover something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, GAP = 6.8, 13.0, 12.0


@dataclass(frozen=True)
class Label:
    """Text with its baseline position and SVG anchor."""

    x: float
    y: float
    anchor: str
    text: str


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Whether this box lies inside the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def place(
    wanted: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]], frame: Box
) -> list[Label | None]:
    """For each wanted (x, y, text) a label right, left, above or below its point; None where none of these is free."""
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    placed: list[Label | None] = []
    for x, y, text in wanted:
        label, box = next(
            ((label, box) for label, box in _spots(x, y, text) if box.within(frame) and not any(map(box.meets, taken))),
            (None, None),
        )
        placed.append(label)
        if box is not None:
            taken.append(box)
    return placed


def _spots(x: float, y: float, text: str) -> list[tuple[Label, Box]]:
    width = WIDTH * len(text)
    shifts = (
        ("start", GAP, 4.0),
        ("end", -GAP, 4.0),
        ("middle", 0.0, -GAP),
        ("middle", 0.0, GAP + 8),
        ("start", 7.0, -7.0),
        ("start", 7.0, 15.0),
        ("end", -7.0, -7.0),
        ("end", -7.0, 15.0),
    )
    left_of = {"start": 0.0, "middle": width / 2, "end": width}
    spots = []
    for anchor, right, down in shifts:
        left, base = x + right - left_of[anchor], y + down
        box = Box(left, base - HEIGHT + 3, left + width, base + 3)
        spots.append((Label(round(x + right, 1), round(base, 1), anchor, text), box))
    return spots
