"""A search that is interrupted goes on where it was, and comes to the same answer by the same evaluations."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from derc import evaluations, layered
from derc.artifacts import LatencyTable
from derc.compiler import analyse
from derc.config import resolve
from derc.console import Console
from derc.evaluations import Entry, Line, Rematch
from derc.passes.select import Select
from derc.pipeline import Context, Timings
from derc.search import Search
from derc.store import Entry as Stored
from derc.store import Store
from tests.conftest import small_zoo
from tests.world import make_context
from tests.zoos import latency

T = TypeVar("T")
OF_THE_SEARCH = ("stitch", "recalibrate", "score", "select", "seconds of")


class Stopping(Console):
    """Interrupts the work after so many evaluations."""

    def __init__(self, after: int) -> None:
        super().__init__(quiet=True)
        self.left = after

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        for item in items:
            if label == "stitch":
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield item


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Context, Path]:
    """Three untrained donors, and a store that holds what is known of them before a search begins."""
    folder = tmp_path_factory.mktemp("analysed")
    context = make_context(folder, "resnet", "vit", "convnext")
    analyse(context, resolve({}, {}, None), Timings())
    return context, folder


def make_search(world: tuple[Context, Path], folder: Path, console: Console, seed: int = 0) -> Search:
    """A search over the donors with latencies that are made up, its store in `folder`."""
    shutil.copytree(world[1], folder, dirs_exist_ok=True)
    context = replace(world[0], console=console, seed=seed, store=Store(folder))
    timings = Timings()
    found = analyse(context, resolve({}, {}, None), timings)
    blocks = {str(block): latency(1.0) for chain in found.partition.blocks.values() for block in chain}
    stitches = {e.stitch: latency(0.1) for e in layered.build(found.cuts, found.partition).edges if e.stitch}
    names = tuple(context.zoo.names)
    table = LatencyTable("cpu", {}, dict.fromkeys(names, latency(4.0)), blocks, stitches, 0.01)
    select = Select(latency_ms=4.25, top=3, heads=names)
    return Search(context, select, found.cuts, found.embedded, found.partition, table, 9, timings)


def timeless(log: Iterable[Line]) -> list[Line]:
    return [replace(entry, seconds=None) for entry in log]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Search:
    search = make_search(world, tmp_path_factory.mktemp("whole"), Console(quiet=True))
    search.run()
    return search


def test_the_log_holds_every_evaluation(whole):
    assert [entry.number for entry in whole.log] == list(range(1, len(whole.log) + 1))
    assert {entry.assembly for entry in whole.log} == set(map(str, whole.judged))
    assert len({entry.assembly for entry in whole.log}) == len(whole.log) == 3 + 9
    rounds = {number: [e.by for e in whole.log if e.round == number] for number in range(9)}
    singles = {number: ["mean" if number % 4 else "draw"] for number in range(2, 9)}
    assert rounds == {0: ["donor"] * 3, 1: ["prior"] * 2} | singles
    for entry in whole.log:
        assert entry.score == whole.judged[next(a for a in whole.judged if str(a) == entry.assembly)].scores.value
        assert (entry.predicted is None) == (entry.by == "donor")
        assert entry.seconds is not None and entry.seconds > 0
    assert evaluations.read(evaluations.lines(whole.log)) == tuple(whole.log)


def test_every_proposal_meets_the_budget(whole):
    stitched = [one for assembly, one in whole.judged.items() if not assembly.intact]
    assert all(one.predicted["latency_ms"] <= 4.25 for one in stitched)


@pytest.mark.parametrize("after", [0, 2, 3, 5, 6, 7, 8, 11])
def test_interrupted_at_any_evaluation_it_ends_alike(tmp_path, world, whole, after):
    with pytest.raises(KeyboardInterrupt):
        make_search(world, tmp_path, Stopping(after)).run()
    again = make_search(world, tmp_path, Console(quiet=True))
    again.run()
    assert timeless(again.log) == timeless(whole.log)
    best, expected = again.best(), whole.best()
    assert best is not None and expected is not None and best.assembly == expected.assembly


def test_another_seed_draws_other_networks(tmp_path, world, whole):
    other = make_search(world, tmp_path, Console(quiet=True), seed=1)
    other.run()
    assert timeless(other.log) != timeless(whole.log)
    assert [e.assembly for e in other.log[:7]] == [e.assembly for e in whole.log[:7]]


def compiling(zoo: Path, store: Path, output: Path) -> subprocess.Popen[bytes]:
    """A compile that matches, on one thread, in a process group of its own."""
    options = {"data": "digits", "evaluations": 8, "top": 3, "probe": 64, "profile-s": 2, "threads": 1, "macs-g": 0.01}
    flags = [text for name, value in {**options, "match": 320}.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "derc", "compile", "--zoo", str(zoo), *flags, "-o", str(output)]
    environment = os.environ | {"DERC_CACHE": str(store), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors.decode()


def kill(process: subprocess.Popen[bytes], store: Path, note: str, count: int) -> None:
    """Kill the compile as soon as the store has so many entries of that note."""
    while process.poll() is None:
        if len(noted(store, note)) >= count:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def noted(root: Path, *notes: str) -> dict[str, Stored]:
    """The store's entries whose note begins with one of these."""
    return {entry.key: entry for entry in Store(root).entries() if entry.note.startswith(notes)}


def forget(root: Path, *notes: str) -> None:
    """Remove everything from a store that has one of these notes."""
    for key in noted(root, *notes):
        shutil.rmtree(root / "entries" / key[:2] / key)


def test_a_compile_that_is_killed_resumes_and_ships_the_same(tmp_path):
    """Killed in its search, then, when it has gone on, while it matches networks."""
    zoo, store = small_zoo(tmp_path, "resnet-slim", "vit-patch8"), tmp_path / "store"
    finish(compiling(zoo, store, tmp_path / "whole"))
    matched = noted(store, "match")
    assert len(matched) > 1
    forget(store, *OF_THE_SEARCH, "match")

    kill(compiling(zoo, store, tmp_path / "killed"), store, "score", 6)
    assert not (tmp_path / "killed").exists() and not noted(store, "match")
    before = noted(store, *OF_THE_SEARCH)
    kept = [float(Store(store).get_bytes(key) or 0) for key, e in before.items() if e.note.startswith("seconds of")]

    kill(compiling(zoo, store, tmp_path / "killed"), store, "match", 1)  # the next network is being matched
    assert not (tmp_path / "killed").exists() and len(noted(store, "match")) < len(matched)

    finish(compiling(zoo, store, tmp_path / "resumed"))
    after = noted(store, "")
    assert all(after[key] == entry for key, entry in before.items())
    log, manifest = check_same(tmp_path, "resumed")
    evaluated = [line for line in log if isinstance(line, Entry)]
    assert 5 <= len(kept) < len(evaluated) and set(kept) <= {line.seconds for line in evaluated}
    check_lines(log, [one for one in manifest["candidates"] if one["matching"]], len(matched))


def check_same(folder: Path, other: str) -> tuple[list[Line], dict[str, object]]:
    """Check that the bundle `other` is the network of `whole`, after the same log; that log and its manifest."""
    logs = [evaluations.read((folder / name / evaluations.FILE).read_text()) for name in ("whole", other)]
    assert timeless(logs[0]) == timeless(logs[1])
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in ("whole", other)]
    for name in ("model.py", "weights.safetensors", "model.onnx", "plan.txt"):
        assert manifests[0]["files"][name] == manifests[1]["files"][name]
    told = [[dict(c["matching"] or {}, seconds=None) for c in one["candidates"]] for one in manifests]
    assert told[0] == told[1]
    return list(logs[1]), manifests[1]


def check_lines(log: list[Line], candidates: list[dict[str, object]], count: int) -> None:
    """Check that the log ends with a line for each network that was matched, and says what the manifest says."""
    assert [line.number for line in log] == list(range(1, len(log) + 1))
    assert evaluations.read(evaluations.lines(log)) == tuple(log)
    lines = {line.assembly: line for line in log[-count:] if isinstance(line, Rematch)}
    scored = {line.assembly: line.score for line in log[:-count] if isinstance(line, Entry)}
    assert len(candidates) == len(lines) == count and len(scored) == len(log) - count
    for one in candidates:
        line, told = lines[one["assembly"]], one["matching"]
        assert (line.teacher, line.images, line.kept) == (told["teacher"], told["images"], told["kept"])
        assert (line.agreement_before, line.agreement) == (told["agreement"]["before"], told["agreement"]["after"])
        assert line.score_before == scored[one["assembly"]] == told["validation"]["before"]
        assert line.kept == (line.score >= line.score_before)
        assert told["validation"]["after"] == max(line.score, line.score_before)
