"""Networks on the same images: is one ahead of another by more than chance, and which is the answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from derc.analysed import Array


def ahead(ours: Array, theirs: Array) -> bool:
    """Whether `ours`, which images are answered right, (n,) of bool, is significantly more than `theirs`.

    Wins, images that only the one answers right, must exceed losses by one standard deviation of their difference,
    which is the root of their sum (McNemar 1947).
    """
    wins, losses = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return bool(wins - losses > (wins + losses) ** 0.5)


def chosen(ranks: Sequence[tuple[float, float]], donors: Sequence[bool], beats: Callable[[int, int], bool]) -> int:
    """The place of the answer among networks of these `ranks`, of which some are intact `donors`.

    It is the best, but an assembly replaces the best donor only where it `beats` it (docs/decisions/0003).
    """
    best = max((place for place, donor in enumerate(donors) if donor), key=ranks.__getitem__, default=None)
    allowed = [
        place
        for place, donor in enumerate(donors)
        if best is None or place == best or (not donor and beats(place, best))
    ]
    return max(allowed, key=ranks.__getitem__)
