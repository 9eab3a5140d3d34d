"""derc assemble: a recipe's assembly through the compile's own emission and packaging."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from derc import bundle, exporting, registry
from derc.artifacts import Array, Assembly, BlockRef, Emitted, Joint, Matched, Shipped, StitchedAssembly
from derc.assembled import seeded
from derc.config import CompileSettings
from derc.console import Console
from derc.data import Data, Split
from derc.errors import UsageError
from derc.lowered import Lowered
from derc.matching import BEST, TAIL
from derc.measure import LEAST_LIMIT_S
from derc.milp import choose
from derc.modules import Stitch
from derc.parts import Part, few, parts
from derc.passes.emit import Emit
from derc.passes.match import Match
from derc.passes.package import Package
from derc.passes.stitch import FitStitches
from derc.pipeline import Context
from derc.planning import Plan, plan
from derc.recipe import Recipe, read_recipe
from derc.store import Store
from derc.summary import command_line
from derc.target import Target
from derc.zoo import Zoo

SOURCES = ("zoo", "checkpoint", "offline", "input_size", "data", "probe", "seed", "match", "match_teacher")
DEVICE = ("target", "threads", "batch", "profile_s")
"""Settings that matter to a recipe."""
RANDOM_IMAGES = 16
"""Images that a recipe without data is verified on."""


@dataclass(frozen=True)
class Built:
    """A recipe's network, emitted, verified and measured; `anchor` is the donor that it was measured beside.

    `fitted` names the parts that were fitted on the probe images, with what they leave unexplained there. Where it was
    `matched`, `unmatched` is the network before.
    """

    path: Path
    recipe: Recipe
    settings: CompileSettings
    command: str
    context: Context
    stitched: StitchedAssembly
    fitted: dict[str, float]
    emitted: Emitted
    shipped: Shipped
    anchor: str
    matched: Matched | None
    unmatched: StitchedAssembly

    @property
    def parts(self) -> tuple[Part, ...]:
        return parts(self.stitched.assembly, self.context.lowered)


def assemble_bundle(path: Path, settings: CompileSettings, console: Console) -> dict[str, Any]:
    """Build the recipe in the file `path`, write its bundle and return the manifest.

    Raises UsageError for what is wrong with recipe or zoo, and the errors of emission and packaging.
    """
    from derc.recipe_bundle import write

    started = time.perf_counter()
    if settings.embedded_zoo:
        raise UsageError(f'the recipe {path} names no zoo: write zoo = "zoo.toml" on top of it, or give --zoo')
    bundle.check_output(settings.output)
    Target.load(settings.target).require()  # one that is unknown or not here is refused before any donor is built
    recipe, made, store = open_recipe(path, settings, console)
    context = open_context(settings, made, store, console)
    console.say(f"assembling {made.assembly} …")
    probe = None if "data" in settings.defaulted else context.data.probe
    told = few(parts(made.assembly, made.lowered), len(probe)) if probe else ""
    if told:
        console.say(told)
    unmatched, fitted = stitch(made, probe, settings.seed)
    matched = match(context, unmatched, settings)
    stitched = matched.stitched if matched else unmatched
    with console.status("emit"):
        emitted = Emit().run(context, stitched)
    anchor = min(made.lowered, key=lambda name: made.lowered[name].graph.macs)
    with console.status("package"):
        beside = _intact(made.lowered[anchor], context.target.batch)
        shipped = Package(limit_s=(settings.profile_s or LEAST_LIMIT_S) / 2).run(context, emitted, beside)
    names = [name for name in SOURCES + DEVICE if name not in settings.defaulted]
    command = command_line(settings, "assemble", str(path.absolute()), names=names)
    built = Built(
        path, recipe, settings, command, context, stitched, fitted, emitted, shipped, anchor, matched, unmatched
    )
    return write(built, time.perf_counter() - started)


def open_recipe(path: Path, settings: CompileSettings, console: Console) -> tuple[Recipe, Plan, Store]:
    """The recipe in the file `path` with its plan; every donor that it uses is checked.

    Raises UsageError, naming the file, where it is wrong.
    """
    recipe = read_recipe(path)
    store = Store.default(say=console.say, on_damage=console.say)
    checkpoint = Path(settings.checkpoint) if settings.checkpoint else None
    zoo = Zoo.load(settings.zoo, checkpoint=checkpoint, offline=settings.offline, check=lambda _: None)
    try:
        made = plan(recipe, zoo, settings.size)
    except UsageError as error:
        raise UsageError(f"recipe {path}, {error}") from error
    for donor in console.track(made.zoo.donors, "donors", len(made.zoo.donors)):
        remark = donor.check()
        if remark:
            console.say(f"donor {donor.name}: {remark}")
    return recipe, made, store


def open_context(settings: CompileSettings, made: Plan, store: Store, console: Console) -> Context:
    """What emission and packaging need; without data, random images to verify on."""
    target = Target.load(settings.target, threads=settings.threads, batch=settings.batch)
    engine = registry.open_engine(target.engine, target.threads)
    if "data" in settings.defaulted:
        data = random_data(made.image, settings.seed)
    else:
        data = Data.load(
            settings.data, input_size=made.image, probe=settings.probe, seed=settings.seed, track=console.track
        )
    solver = choose(settings.solver)
    return Context(made.zoo, data, target, store, engine, solver, made.lowered, console, settings.seed)


def random_data(image: tuple[int, int, int], seed: int) -> Data:
    """Uniformly random images of shape `image` (C, H, W), without labels."""
    channels, height, width = image
    shape = RANDOM_IMAGES, height, width, channels
    split = Split(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), None)
    return Data("random", None, split, split, split)


def stitch(made: Plan, probe: Split | None, seed: int) -> tuple[StitchedAssembly, dict[str, float]]:
    """The assembly with weights for what derc adds: random under `seed`, or fitted on `probe` where that is possible.

    A linear stitch is fitted in closed form where its target donor takes the same images. Returns what each fitted
    stitch leaves unexplained, by the part's name.
    """
    added = _fresh(made.assembly, made.lowered, seed)
    fitted: dict[str, float] = {}
    front: list[nn.Module] = []
    every = parts(made.assembly, made.lowered)
    for place, part in enumerate(every):
        if isinstance(part.spec, BlockRef):
            front.append(made.lowered[part.spec.donor].block(part.spec.first, part.spec.last).eval())
            continue
        module = added[part.name]
        follows = every[place + 1].spec if isinstance(part.spec, Joint) else None
        if probe is not None and isinstance(module, Stitch) and isinstance(follows, BlockRef):
            donor = made.zoo[follows.donor]
            if donor.input_size == made.image and follows.first > 0:
                target = made.lowered[follows.donor].block(0, follows.first).eval()
                names = "the network in front", f"donor {follows.donor}"
                fitted[part.name] = FitStitches().fit(module, nn.Sequential(*front), target, probe, names)
        front.append(module)
    states = tuple(_state(module) for module in added.values())
    return StitchedAssembly(made.assembly, states, tuple(fitted.values())), fitted


def match(context: Context, stitched: StitchedAssembly, settings: CompileSettings) -> Matched | None:
    """The assembly with what derc adds trained without labels, as the settings ask; None where they do not.

    Raises UsageError where there are no images, where nothing can be trained, and for a teacher that is no donor of it.
    """
    amount, teacher = settings.match_amount, settings.match_teacher
    if not amount:
        return None
    if "data" in settings.defaulted:
        raise UsageError("--match needs images: give --data")
    if teacher == BEST:
        raise UsageError("--match-teacher best: no donors are judged here, so give tail or a donor's name")
    if teacher != TAIL:
        teacher = context.zoo[teacher].name
    teacher = TAIL if teacher == stitched.assembly.blocks[-1].donor else teacher
    context.console.say("match …")
    with context.console.status("match"):
        return Match(amount.images, amount.seconds, teacher).run(context, stitched)


def _fresh(assembly: Assembly, lowered: Mapping[str, Lowered], seed: int) -> dict[str, nn.Module]:
    """What derc adds, by the parts' names, in order."""
    with seeded(seed):
        return {
            part.name: part.build().eval() for part in parts(assembly, lowered) if not isinstance(part.spec, BlockRef)
        }


def _state(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def _intact(lowered: Lowered, batch: int) -> bytes:
    """The ONNX model of a whole donor."""
    example = torch.zeros(batch, *lowered.cuts[0].type.shape)
    return exporting.export(lowered.block(0, len(lowered.units)), example, ("output",))
