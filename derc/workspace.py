"""From settings to a context: zoo, data, target, engine, solver, store and the live donors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from derc import registry, scoring, triton
from derc.artifacts import digest
from derc.console import Console
from derc.data import Data
from derc.donor import Donor, left_out
from derc.engine import Engine, parse
from derc.errors import UsageError
from derc.lowered import Lowered
from derc.matching import BEST, TAIL
from derc.milp import choose
from derc.passes.cut import CutDonors, find_cuts
from derc.passes.lower import lower
from derc.pipeline import Context
from derc.store import Store
from derc.target import Target
from derc.version import VERSION
from derc.zoo import Zoo

if TYPE_CHECKING:
    from derc.config import CompileSettings


NEGLIGIBLE = CutDonors().negligible
STAND_IN = "onnxruntime"
"""The engine that computes, on this processor, for a device that is not here."""


class LiveDonors(Mapping[str, Lowered]):
    """Donors built, traced and cut on first use."""

    def __init__(self, zoo: Zoo, negligible: float) -> None:
        self.zoo = zoo
        self.negligible = negligible
        self._made: dict[str, Lowered] = {}

    def __getitem__(self, name: str) -> Lowered:
        if name not in self._made:
            self._made[name] = self._lower(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.zoo.names)

    def __len__(self) -> int:
        return len(self.zoo.donors)

    def _lower(self, name: str) -> Lowered:
        donor = self.zoo[name]
        lowered = lower(donor.build(), donor.input_size, name=name, mean=donor.mean, std=donor.std)
        return lowered.with_cuts(find_cuts(lowered.graph, self.negligible))


def check_once(store: Store, donor: Donor, console: Console) -> None:
    """`donor.check()`, unless a donor of the same digest passed it before; says what is to be said of its weights."""
    key = digest(["checked", donor.digest(), VERSION])
    remark = store.get_bytes(key)
    if remark is None:
        remark = donor.check().encode()
        store.put_bytes(key, remark, note=f"checked {donor.name}")
    if remark:
        console.say(f"donor {donor.name}: {remark.decode()}")


def load_zoo(settings: CompileSettings, console: Console) -> Zoo:
    """The zoo as it is written, at the input size asked for; no donor's weights are looked at."""
    checkpoint = Path(settings.checkpoint) if settings.checkpoint else None
    zoo = Zoo.load(
        settings.zoo,
        checkpoint=checkpoint,
        offline=settings.offline,
        input_size=settings.size,
        check=lambda _: None,
    )
    for name, reason in zoo.left_out.items():
        console.say(left_out(name, reason))
    return zoo


def open_zoo(settings: CompileSettings, store: Store, console: Console) -> Zoo:
    """The zoo, every donor checked; raises UsageError where one does not work."""
    zoo = load_zoo(settings, console)
    for donor in console.track(zoo.donors, "donors", len(zoo.donors)):
        check_once(store, donor, console)
    return zoo


def open_data(settings: CompileSettings, zoo: Zoo, console: Console) -> Data:
    """The images at the donors' input size; raises UsageError where the donors' sizes differ."""
    sizes = {donor.input_size for donor in zoo.donors}
    if len(sizes) > 1:
        text = ", ".join(f"{donor.name} {donor.input_size}" for donor in zoo.donors)
        raise UsageError(f"the donors' input sizes differ ({text}): give --input-size, and all are brought to it")
    (size,) = sizes
    return Data.load(settings.data, input_size=size, probe=settings.probe, seed=settings.seed, track=console.track)


def open_context(settings: CompileSettings, console: Console) -> Context:
    """Everything that measuring on the target needs, checked, with the first of the engines asked for.

    Raises a DercError naming what is missing, the device too.
    """
    context = open_contexts(settings, console)[0]
    context.target.require()
    return context


def open_contexts(settings: CompileSettings, console: Console) -> tuple[Context, ...]:
    """Everything a compile needs, checked, once for each engine asked for; raises a DercError naming what is missing.

    Where the target is not here, ONNX Runtime on this processor computes in place of its engines.
    """
    if settings.lacks_data:
        raise UsageError(
            f"--data is missing: the zoo {settings.zoo} needs images, give folder:PATH, npz:PATH or hf:PATH"
        )
    target = Target.load(settings.target, threads=settings.threads, batch=settings.batch)
    targets = [replace(target, engine=spec) for spec in settings.engines or (target.engine,)]
    for one in targets:
        registry.known_engine(one.engine)
        if settings.emit == "triton":
            triton.kind_of(dict(zip(("engine", "variant"), parse(one.engine), strict=True)))
    solver, present = choose(settings.solver, console.say), target.present
    engines = [registry.open_engine(one.engine if present else STAND_IN, one.threads * present) for one in targets]
    where = "here" if present else f"on this machine, which is not {target.name}"
    precisions = [lower_precisions(engine, settings.precisions, where) for engine in engines]
    for own, more in zip((engine.precisions[0] for engine in engines), precisions, strict=True):
        check_objective(settings.objective, (own, *more[1:]))
    store = Store.default(say=console.say, on_damage=console.say)
    zoo = open_zoo(settings, store, console)
    if settings.match_amount and settings.match_teacher not in (TAIL, BEST):
        _ = zoo[settings.match_teacher]  # refused now, not when the search is over
    data = open_data(settings, zoo, console)
    lowered = LiveDonors(zoo, NEGLIGIBLE)
    return tuple(
        Context(zoo, data, one, store, engine, solver, lowered, console, settings.seed, lower, settings.objective)
        for one, engine, lower in zip(targets, engines, precisions, strict=True)
    )


def check_objective(name: str, precisions: tuple[str, ...]) -> None:
    """Raise UsageError where networks are computed in other precisions than float32 and the proxy would not see it."""
    if precisions != ("fp32",) and not scoring.open_proxy(name).sees_precision:
        raise UsageError(
            f"--objective {name} judges networks in float32, so it cannot tell {', '.join(precisions)} apart: "
            "rank by accuracy or kl, or compile in float32"
        )


def lower_precisions(engine: Engine, asked: tuple[str, ...], where: str = "here") -> tuple[str, ...]:
    """float32, which stands for the engine's own precision, and what else of `asked` a block may be rewritten to.

    Raises UsageError for a precision that the engine does not have.
    """
    own = engine.precisions[0]
    lacking = [name for name in asked if name not in ("fp32", *engine.precisions)]
    if lacking:
        spec = ":".join(filter(None, (engine.name, engine.variant)))
        raise UsageError(
            f"--precision {','.join(lacking)}: the engine {spec} computes in {', '.join(engine.precisions)} {where}"
        )
    return ("fp32", *(name for name in asked if name not in ("fp32", own)))
