"""Two networks on the same images: is the one ahead by more than chance?"""

from __future__ import annotations

from derc.analysed import Array


def ahead(ours: Array, theirs: Array) -> bool:
    """Whether `ours`, which images are answered right, (n,) of bool, is significantly more than `theirs`.

    Wins, images that only the one answers right, must exceed losses by one standard deviation of their difference,
    which is the root of their sum (McNemar 1947).
    """
    wins, losses = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return bool(wins - losses > (wins + losses) ** 0.5)
