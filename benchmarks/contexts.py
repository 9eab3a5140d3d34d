"""How a benchmark opens a zoo that it has in memory: on this processor, in a store of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from derc import registry
from derc.console import Console
from derc.data import Data
from derc.milp import choose
from derc.pipeline import Context
from derc.store import Store
from derc.target import Target
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo


def open_context(zoo: Zoo, data: Data, seed: int = 0) -> Context:
    """The zoo's donors and the images, silent, with an empty store."""
    target, store = Target.load("cpu"), Store(Path(tempfile.mkdtemp(prefix="derc-benchmark-")))
    engine, lowered = registry.open_engine(target.engine), LiveDonors(zoo, NEGLIGIBLE)
    return Context(zoo, data, target, store, engine, choose("derc"), lowered, Console(quiet=True), seed)
