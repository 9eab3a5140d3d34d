"""What all seeds of the accuracy benchmark share: the analysed zoo, latencies, budgets, and what is kept on file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.accuracy_zoo import Images, Size, load_zoo
from benchmarks.contexts import open_context
from derc import registry
from derc.artifacts import CutZoo, EmbeddedZoo, LatencyTable, LoweredZoo, Partition, decode, encode
from derc.compiler import Analysis, Prepared, analyse, latencies
from derc.config import CompileSettings
from derc.data import Data
from derc.pipeline import Context, Timings
from derc.store import Store
from derc.target import Target
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo

T = TypeVar("T")
Row = dict[str, Any]


class NotComputedError(Exception):
    """A row that was not computed yet."""


@dataclass(frozen=True)
class Work:
    """A folder in which everything that was computed stays; whatever is there is not computed again.

    With `closed`, no row is made: one that is not there raises NotComputedError.
    """

    folder: Path
    closed: bool = False

    def row(self, key: str, make: Callable[[], Row]) -> Row:
        """The row of this key; `seconds`, unless the row has them, are those of making it."""
        path = self.folder / "rows" / f"{key}.json"
        if not path.is_file():
            if self.closed:
                raise NotComputedError(key)
            start = time.perf_counter()
            row = make()
            whole(path, lambda part: part.write_text(json.dumps({"seconds": time.perf_counter() - start, **row})))
        found: Row = json.loads(path.read_text(encoding="utf-8"))
        return found

    def artifact(self, key: str, kind: type[T], make: Callable[[], T]) -> T:
        """An artifact of derc's, as text and arrays."""
        path = self.folder / "artifacts" / f"{key}.json"
        if not path.is_file():
            text, arrays = encode(make())
            whole(path.with_suffix(".safetensors"), lambda part: save_arrays(arrays, part))
            whole(path, lambda part: part.write_text(text))
        return decode(kind, path.read_text(encoding="utf-8"), load_arrays(path.with_suffix(".safetensors")))

    def save(self, key: str, network: nn.Module) -> None:
        """Keep a network's weights."""
        state = {name: value.contiguous() for name, value in network.state_dict().items()}
        whole(self.folder / "states" / f"{key}.safetensors", lambda part: save_file(state, part))

    def load(self, key: str, network: nn.Module) -> None:
        """Give a network the weights that were kept."""
        network.load_state_dict(load_file(self.folder / "states" / f"{key}.safetensors"))

    @property
    def lock(self) -> FileLock:
        """Held while what all seeds share is made."""
        return FileLock(self.folder / "lock")


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


@dataclass(frozen=True, eq=False)
class World:
    """The zoo with its analysis, latency table and budgets in ms; `fresh` are the donors without their weights.

    `data` gives the images of a seed. `coarse` is the analysis with latencies that the paper's search has, where its
    partition is another one.
    """

    work: Work
    size: Size
    data: Callable[[int], Data]
    zoo: Zoo
    analysis: Analysis
    table: LatencyTable
    budgets: tuple[float, ...]
    lowered: LiveDonors
    fresh: LiveDonors
    coarse: tuple[Analysis, LatencyTable] | None = None

    @property
    def fastest(self) -> float:
        return min(latency.ms for latency in self.table.donors.values())

    @property
    def slowest(self) -> float:
        return max(latency.ms for latency in self.table.donors.values())

    @cache  # noqa: B019 one world a process
    def prepared(self, seed: int) -> Prepared:
        """A seed's images with the shared analysis and latencies; what passes compute is kept in the work folder."""
        context = on_one_thread(open_context(self.zoo, self.data(seed), seed), self.lowered, self.work)
        heads = context.data.task_donors(self.zoo)
        return Prepared((context,), heads, self.analysis, (self.table,), Timings(), time.perf_counter())

    def context(self, seed: int) -> Context:
        return self.prepared(seed).contexts[0]


def open_world(shared: Path, folder: Path, size: Size, budgets: int, *, closed: bool = False) -> World:
    """Train the benchmark's own donors, analyse and profile the zoo, or take all that from the work folder."""
    work, images = Work(folder, closed), Images.load(shared)
    folder.mkdir(parents=True, exist_ok=True)
    with work.lock:
        zoo = load_zoo(shared, folder, size, images)
        live = LiveDonors(zoo, NEGLIGIBLE)
        context = on_one_thread(open_context(zoo, images.analysis(size)), live, work)
        analysis, table = shared_artifacts(work, context, size)
        coarse = coarser(work, context, size, analysis)
    fresh = Zoo("fresh", tuple(replace(donor, weights=None) for donor in zoo.donors))
    limits = spaced(table, budgets)
    drawn = partial(images.unseen, size)
    return World(work, size, drawn, zoo, analysis, table, limits, live, LiveDonors(fresh, NEGLIGIBLE), coarse)


def on_one_thread(context: Context, lowered: LiveDonors, work: Work) -> Context:
    """The context with an engine of one thread, which other work on the machine disturbs least, and a lasting store."""
    target = Target.load("cpu", threads=1)
    engine = registry.open_engine(target.engine, target.threads)
    return replace(context, target=target, engine=engine, lowered=lowered, store=Store(work.folder / "store"))


def shared_artifacts(work: Work, context: Context, size: Size) -> tuple[Analysis, LatencyTable]:
    """The analysis and the latency table; made once, so that a run that goes on has the same budgets."""
    timings, settings = Timings(), CompileSettings(profile_s=size.profile_s, blocks=size.blocks)
    analysis = analysed(work, context, settings, timings)
    table = work.artifact(
        "table", LatencyTable, lambda: replace(latencies(context, analysis, settings, timings), samples={})
    )
    return analysis, table


def coarser(work: Work, context: Context, size: Size, analysis: Analysis) -> tuple[Analysis, LatencyTable]:
    """The same zoo in the paper's number of blocks, and their latencies; made once, right after the others."""
    timings, settings = Timings(), CompileSettings(profile_s=size.profile_s, blocks=size.paper_blocks)
    blocks = work.artifact("paper-partition", Partition, lambda: analyse(context, settings, timings).partition)
    found = replace(analysis, partition=blocks)
    table = work.artifact(
        "paper-table", LatencyTable, lambda: replace(latencies(context, found, settings, timings), samples={})
    )
    return found, table


def analysed(work: Work, context: Context, settings: CompileSettings, timings: Timings) -> Analysis:
    """The analysis of the context's zoo; made once."""
    made = cache(lambda: analyse(context, settings, timings))
    return Analysis(
        work.artifact("lowered", LoweredZoo, lambda: made().lowered),
        work.artifact("cuts", CutZoo, lambda: made().cuts),
        work.artifact("embedded", EmbeddedZoo, lambda: made().embedded),
        work.artifact("partition", Partition, lambda: made().partition),
    )


def spaced(table: LatencyTable, count: int) -> tuple[float, ...]:
    """So many budgets in even ratios between the fastest and the slowest donor, neither of which is one."""
    known = [latency.ms for latency in table.donors.values()]
    return tuple(round(float(ms), 5) for ms in np.geomspace(min(known), max(known), count + 2)[1:-1])
