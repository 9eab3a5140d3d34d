"""A pass is a frozen dataclass whose fields are its options; `execute` runs one through the store."""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from derc.artifacts import decode, digest, encode
from derc.building import Builder
from derc.console import Console
from derc.engine import Engine
from derc.milp import Solver
from derc.threads import cores

if TYPE_CHECKING:
    from derc.data import Data
    from derc.fronts import Fronts
    from derc.lowered import Lowered
    from derc.recall import Recall
    from derc.store import Store
    from derc.target import Target
    from derc.zoo import Zoo

Out = TypeVar("Out", covariant=True)
NOT_IN_KEYS: tuple[str, ...] = (
    "api",
    "bench",
    "bundle",
    "cli",
    "__main__",
    "compiler",
    "config",
    "console",
    "doctor",
    "inspection",
)
NOT_IN_KEYS += ("completing", "disturbances", "shipping", "manifest", "outcome", "search", "summary", "version")
NOT_IN_KEYS += ("proposing", "evaluations", "refining")
NOT_IN_KEYS += ("transfer", "cli_targets", "shelf", "tabling", "target_views")
NOT_IN_KEYS += ("assembling", "planning", "recipe", "recipe_bundle")
NOT_IN_KEYS += ("cli_finetune", "finetuning", "finetuned", "blockwise", "children")
"""Core modules that no pass's result depends on."""


@dataclass(frozen=True)
class Context:
    """What a pass gets besides its input artifacts: the live things, handed in and never global.

    `lowered` gives the live, traced donors by name; it is filled lazily by the top level. `precisions` are those that
    a block may have: float32 first, which means the engine's own, then those that it is rewritten to. `objective` names
    the proxy that candidates are ranked by.
    """

    zoo: Zoo
    data: Data
    target: Target
    store: Store
    engine: Engine
    solver: Solver
    lowered: Mapping[str, Lowered]
    console: Console = field(default_factory=Console)
    seed: int = 0
    precisions: tuple[str, ...] = ("fp32",)
    objective: str = "accuracy"

    @cached_property
    def builder(self) -> Builder:
        """Builds with `engine` in child processes, started at the first builds; one for each core, up to four."""
        return Builder(self.engine, workers=min(cores(), 4))

    @cached_property
    def fronts(self) -> Fronts:
        """What networks' fronts give on the images, kept between the passes."""
        from derc.fronts import Fronts

        return Fronts()

    @cached_property
    def recall(self) -> Recall:
        """What networks' fronts give for images in any order, kept between the passes."""
        from derc.recall import Recall

        return Recall()


class Pass(Protocol[Out]):
    """`run` reads artifacts and returns one of type `produces`; `inputs` digests the live inputs that it reads."""

    name: ClassVar[str]
    produces: ClassVar[type]

    def run(self, context: Context, *artifacts: Any) -> Out: ...

    def inputs(self, context: Context) -> str:
        """Digest of what `run` reads from the context: donors' weights, images, device."""


@dataclass
class Timings:
    """Seconds per pass and whether the store had the answer; `told` are the passes that the console has named."""

    seconds: dict[str, float] = field(default_factory=dict)
    reused: dict[str, bool] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def add(self, name: str, seconds: float, reused: bool) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.reused[name] = reused and self.reused.get(name, True)

    def lap(self) -> Timings:
        """A fresh watch for a part of the work, to be included at its end."""
        return Timings(told=self.told)

    def include(self, other: Timings) -> None:
        """Add all of another's."""
        for name, seconds in other.seconds.items():
            self.add(name, seconds, other.reused[name])


@cache
def code_version(module: str) -> str:
    """SHA-256 of the source of `module` and of derc's core that passes share."""
    core = Path(__file__).parent
    sources = [Path(inspect.getfile(sys.modules[module])), *sorted(core.glob("*.py"))]
    ignored = {f"{name}.py" for name in NOT_IN_KEYS}
    state = hashlib.sha256()
    for source in sources:
        if source.name not in ignored:
            state.update(source.read_bytes())
    return state.hexdigest()


def execute(step: Pass[Out], context: Context, *artifacts: Any, timings: Timings) -> Out:
    """Run `step`, or take its artifact from the store where the same step ran on the same inputs before.

    Either way it is as the store gives it, mappings in the order of their keys, so that what follows is the same.
    """
    start = time.perf_counter()
    key = digest(
        [step.name, code_version(type(step).__module__), step.inputs(context)], step, *[digest(a) for a in artifacts]
    )
    found: Out | None = context.store.get(key, step.produces)
    reused = found is not None
    if found is None:
        if step.name not in timings.told:
            timings.told.add(step.name)
            context.console.say(f"{step.name} …")
        with context.console.status(step.name):
            result = step.run(context, *artifacts)
        context.store.put(key, result, note=step.name)
        found = decode(step.produces, *encode(result))
    timings.add(step.name, time.perf_counter() - start, reused)
    return found
