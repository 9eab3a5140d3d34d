"""True values of assemblies, computed once and kept in a file: what every search method of a benchmark asks for.

Assemblies have one block of each equivalence set, as the paper's have. Values are those that the passes stitch and
score give, which `check` holds them against; fronts, their stitches and their activation codes are shared.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import cifarzoo
from benchmarks.contexts import open_context
from derc import fronts, layered
from derc.artifacts import Array, Assembly, BlockRef, digest
from derc.assembled import new_stitch
from derc.compiler import Analysis, analyse
from derc.config import CompileSettings
from derc.data import Data
from derc.fitting import fit
from derc.fronts import Step
from derc.judge import answers, columns_of
from derc.layered import Layered
from derc.passes.score import Consult, Score
from derc.passes.stitch import FitStitches
from derc.pipeline import Context, Timings
from derc.scoring.codes import Codes, Naswot, kernel, log_determinant
from derc.zoo import Zoo

VALIDATION_BATCH = 64
CACHE = Path("out/search_loop")


@dataclass(frozen=True)
class World:
    """A zoo, analysed, and the graph of its assemblies with one block of each equivalence set."""

    name: str
    context: Context
    analysis: Analysis
    graph: Layered


def digits(donors: tuple[str, ...] = (), blocks: int = 4) -> World:
    """The embedded zoo, or some of its donors."""
    zoo = Zoo.load("digits")
    chosen = tuple(one for one in zoo.donors if not donors or one.name in donors)
    return open_world("digits", Zoo(zoo.name, chosen), Data.load("digits", probe=300), blocks)


def cifar(folder: Path, donors: tuple[str, ...] = (), blocks: int = 4) -> World:
    """CIFAR-10 networks of a shared folder, or some of them: 256 images as probes, 300 for validation."""
    data, _ = cifarzoo.load_data(folder / "data", 256, 300, 1, 1)
    zoo = cifarzoo.load_zoo(folder / "zoo", Path(tempfile.mkdtemp(prefix="derc-zoo-")))
    chosen = tuple(one for one in zoo.donors if not donors or one.name in donors)
    return open_world("cifar", Zoo(zoo.name, chosen), data, blocks)


def open_world(name: str, zoo: Zoo, data: Data, blocks: int) -> World:
    """The zoo cut and partitioned with a compile's default options, in a store of its own."""
    context = open_context(zoo, data)
    analysis = analyse(context, CompileSettings(blocks=blocks), Timings())
    graph = layered.build(analysis.cuts, analysis.partition, data.task_donors(zoo), one_per_set=True)
    return World(name, context, analysis, graph)


@dataclass(frozen=True)
class Behind:
    """What is known behind the first blocks of an assembly: the steps, and the sums of codes' kernels by batch."""

    steps: tuple[Step, ...]
    kernels: tuple[Array, ...]


@dataclass
class Values:
    """Accuracy on the validation images, and NASWOT, of the assemblies of a world; `asked` in all, `known` on file."""

    world: World
    folder: Path = CACHE
    known: dict[str, dict[str, float]] = field(default_factory=dict)
    _behind: dict[tuple[BlockRef, ...], Behind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        context, analysis = self.world.context, self.world.analysis
        donors = [context.zoo[name].digest() for name in context.zoo.names]
        key = digest([donors, context.data.digest()], analysis.partition)[:16]
        self.path = self.folder / f"{self.world.name}-{key}.jsonl"
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.known[row.pop("assembly")] = row

    def of(self, assembly: Assembly) -> dict[str, float]:
        """`accuracy` and `naswot` of one assembly, from the file where they are there."""
        name = str(assembly)
        if name not in self.known:
            self.known[name] = self._evaluate(assembly)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"assembly": name, **self.known[name]}) + "\n")
        return self.known[name]

    def check(self, assembly: Assembly) -> tuple[float, float]:
        """How far the values on file are from those of the compile's own passes."""
        context = self.world.context
        scores = Score().run(context, FitStitches().run(context, assembly), Consult().run(context))
        mine = self.of(assembly)
        return abs(scores.accuracy - mine["accuracy"]), abs(scores.naswot - mine["naswot"])

    @torch.no_grad()
    def _evaluate(self, assembly: Assembly) -> dict[str, float]:
        context = self.world.context
        behind = self._walk(assembly)
        split = context.data.validation
        outputs = torch.cat(list(context.fronts.run(split, VALIDATION_BATCH, behind.steps)))
        columns = columns_of(context.zoo[assembly.blocks[-1].donor].labels, context.data)
        right = answers(outputs, columns) == split.labels
        return {"accuracy": float(right.mean()), "naswot": float(np.mean([_logdet(k) for k in behind.kernels]))}

    def _walk(self, assembly: Assembly) -> Behind:
        """Behind all blocks; what is behind fewer of them is kept."""
        behind = Behind((), ())
        for index in range(len(assembly.blocks)):
            key = assembly.blocks[: index + 1]
            known = self._behind.get(key)
            behind = known or self._extend(behind, assembly, index)
            if known is None and index + 1 < len(assembly.blocks):
                self._behind[key] = behind
        return behind

    def _extend(self, behind: Behind, assembly: Assembly, index: int) -> Behind:
        context, block = self.world.context, assembly.blocks[index]
        lowered, steps = context.lowered[block.donor], behind.steps
        if index and assembly.stitched[index - 1]:
            stitch = new_stitch(assembly, index, context.lowered)
            run = partial(context.fronts.run, context.data.probe, FitStitches().batch)
            before = BlockRef(block.donor, 0, block.first, 0)
            fit(stitch, run(steps), run([fronts.block(lowered, before)]))
            steps = (*steps, fronts.added(stitch))
        steps = (*steps, _keeping(fronts.block(lowered, block), keep=index + 1 < len(assembly.blocks)))
        return Behind(steps, self._kernels(behind, steps))

    def _kernels(self, behind: Behind, steps: tuple[Step, ...]) -> tuple[Array, ...]:
        """The kernels with the codes of the new steps added, for each batch of NASWOT's."""
        options, probe = Naswot(), self.world.context.data.probe
        before = self.world.context.fronts.run(probe, options.batch, behind.steps)
        count = min(options.images, len(probe)) // options.batch
        kernels = []
        for number, x in zip(range(count), before, strict=False):
            with Codes() as seen:
                for step in steps[len(behind.steps) :]:
                    x = step.module(x.clone())
            total = behind.kernels[number] if behind.kernels else np.zeros((len(x), len(x)))
            kernels.append(total + kernel([code for code in seen.codes if len(code) == len(x)], len(x)))
        return tuple(kernels)


def _keeping(step: Step, *, keep: bool) -> Step:
    return Step(step.key, step.module, keep)


def _logdet(kernel: Array) -> float:
    return float(np.linalg.slogdet(kernel)[1]) if kernel.any() else log_determinant([])


def allowed(world: World, share: float = 0.5) -> tuple[float, list[Assembly]]:
    """A budget of MACs, that quantile of the donors', and the stitched assemblies within it, common fronts together."""
    donors = [sum(unit.macs for unit in donor.units) for donor in world.analysis.cuts.donors.values()]
    limit = float(np.quantile(donors, share))
    stitched = [assembly for assembly in order(world.graph) if not assembly.intact]
    return limit, [a for a in stitched if world.graph.costs(world.graph.path(a) or ())["macs"] <= limit]


def order(graph: Layered) -> list[Assembly]:
    """All assemblies, those with a common front together."""
    found: list[Assembly] = []

    def grow(last: BlockRef | None, edges: tuple[int, ...]) -> None:
        for place in graph.leaving[last]:
            target = graph.edges[place].target
            if target is None:
                found.append(graph.assembly((*edges, place)))
            else:
                grow(target, (*edges, place))

    grow(None, ())
    return found
