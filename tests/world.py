"""A small real world for passes: untrained donors of several families, scanned digits, a store in a folder."""

from __future__ import annotations

from pathlib import Path

from derc.console import Console
from derc.data import Data
from derc.donor import Donor
from derc.milp import choose
from derc.pipeline import Context
from derc.registry import ENGINES, load
from derc.store import Store
from derc.target import Target
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo
from tests.networks import FAMILIES

DIGITS = tuple(str(i) for i in range(10))


def donor(family: str, *, labels: tuple[str, ...] = DIGITS, mean: float = 0.5, std: float = 0.5) -> Donor:
    name, options = FAMILIES[family]
    return Donor(
        name=family,
        factory=f"timm:{name}",
        kwargs={**options, "num_classes": len(labels)},
        weights=None,
        pretrained=False,
        input_size=(3, 32, 32),
        mean=(mean,) * 3,
        std=(std,) * 3,
        labels=labels,
    )


def make_context(folder: Path, *families: str, probe: int = 64) -> Context:
    """A context over untrained donors of the named families."""
    zoo = Zoo("test", tuple(donor(family) for family in families))
    data = Data.load("digits", probe=probe)
    target = Target.load("cpu")
    engine = load(ENGINES, "onnxruntime")()
    lowered = LiveDonors(zoo, NEGLIGIBLE)
    return Context(zoo, data, target, Store(folder), engine, choose("highs"), lowered, Console(quiet=True))
