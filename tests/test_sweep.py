"""Several budgets at once, and the Pareto front: work is shared, the front is measured, and nothing dominates it."""

from __future__ import annotations

import json
import os
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from derc import bundle
from derc.artifacts import Matched
from derc.assembled import live
from derc.cli import cli
from derc.config import resolve_all
from derc.data import Data
from derc.errors import InfeasibleError, UsageError
from derc.pareto import FILES
from derc.store import Store
from derc.sweep import hypervolume
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo

FLAGS = ("--data", "digits", "--evaluations", "6", "--probe", "128", "--profile-s", "4", "--threads", "1", "-q")


def run(*words):
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_hypervolume_is_the_mean_of_the_best_score():
    random = np.random.default_rng(0)
    for _ in range(20):
        points = list(zip(np.exp(random.uniform(-1, 2, 9)).tolist(), random.uniform(0, 1, 9).tolist(), strict=True))
        fine = np.exp(np.linspace(-0.5, 1.5, 20_001))
        best = [max((score for ms, score in points if ms <= at), default=0.0) for at in fine]
        assert hypervolume(points, np.exp(1.5), np.exp(-0.5)) == pytest.approx(np.mean(best), abs=2e-3)
    assert hypervolume([(1.0, 0.5)], 1.0, 1.0) == 0.5 and hypervolume([(2.0, 0.5)], 1.0, 0.5) == 0.0


@pytest.fixture(scope="module")
def front(compiled, tmp_path_factory):
    """What `derc pareto` says of three donors, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("front") / "out"
    told = json.loads(run("pareto", "--zoo", compiled[2], *FLAGS, "--points", 3, "-o", folder, "--json"))
    return told, folder


def test_no_network_of_the_front_is_dominated_and_each_is_measured(front):
    told, _ = front
    rows = told["networks"]
    best = [row for row in rows if row["front"]]
    assert {row["provenance"] for row in best} == {"measured"}
    assert sum(row["intact"] for row in rows) == 3 and 3 <= told["evaluations"] <= 6
    for row in rows:
        beaten = any(o["ms"] <= row["ms"] and o["score"] >= row["score"] for o in rows if o is not row)
        assert row["front"] != beaten
    assert told["hypervolume"]["all"] >= told["hypervolume"]["intact"] > 0.5
    assert len(told["budgets_ms"]) == 3 and told["budgets_ms"] == sorted(told["budgets_ms"])


def test_the_front_keeps_to_the_other_budgets(front, compiled, tmp_path):
    """Donors that are too large are neither on the front nor in the plot."""
    params = {row["spans"]: row["params"] for row in front[0]["networks"] if row["intact"]}
    limit = (max(params.values()) - 1) / 1e6
    words = ("pareto", "--zoo", compiled[2], *FLAGS, "--points", 2, "--params-m", limit, "-o", tmp_path, "--json")
    rows = json.loads(run(*words))["networks"]
    assert rows and all(row["params"] <= limit * 1e6 for row in rows)
    assert sum(row["intact"] for row in rows) == sum(count <= limit * 1e6 for count in params.values()) < len(params)
    ElementTree.parse(tmp_path / "pareto.svg")
    words = ("pareto", "--zoo", compiled[2], *FLAGS, "--points", "2", "--params-m", "1e-6", "-o", tmp_path / "none")
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert isinstance(result.exception, InfeasibleError) and "--params-m" in str(result.exception)
    assert not (tmp_path / "none").exists()


def test_the_front_is_written_as_table_json_and_plot(front):
    told, folder = front
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert json.loads((folder / "pareto.json").read_text()) == told
    text = (folder / "pareto.txt").read_text()
    assert all((row["spans"] in text) == row["front"] for row in told["networks"])
    drawn = ElementTree.parse(folder / "pareto.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == len(told["networks"])


@pytest.fixture(scope="module")
def matched_front(compiled, front, tmp_path_factory):
    """The same with matching: what was said, the folder, and the networks that were matched, by their assemblies."""
    store, folder = Store(Path(os.environ["DERC_CACHE"])), tmp_path_factory.mktemp("matched") / "out"
    before = {entry.key for entry in store.entries()}
    words = ["--zoo", compiled[2], *FLAGS, "--points", 3, "--match", 1280, "--match-teacher", "best"]
    told = json.loads(run("pareto", *words, "-o", folder, "--json"))
    found = [store.get(e.key, Matched) for e in store.entries() if e.note == "match" and e.key not in before]
    return told, folder, {str(one.stitched.assembly): one for one in found}


def test_what_matters_for_the_front_is_matched_and_nothing_else_changes(front, matched_front):
    told, _, matched = matched_front
    rows, plain = told["networks"], {row["assembly"]: row for row in front[0]["networks"]}
    assert {row["assembly"] for row in rows} == plain.keys() and all(row["matching"] is None for row in plain.values())
    assert matched and {row["assembly"] for row in rows if row["matching"]} == matched.keys()
    others = [row for row in rows if not row["intact"]]
    assert all(row["matching"] for row in others if row["front"])
    for budget in told["budgets_ms"]:
        within = [(row["score"], row["matching"] is not None) for row in others if row["ms"] <= budget]
        assert not within or max(within)[1]
    for row in rows:
        was = plain[row["assembly"]]["score"]
        assert row["score"] >= was if row["matching"] else row["score"] == was
        assert row["matching"] is None or row["matching"]["score_before"] == was


@torch.no_grad()
def test_a_matched_network_has_the_accuracy_that_it_has_by_itself(compiled, matched_front):
    told, folder, matched = matched_front
    donors = LiveDonors(Zoo.load(str(compiled[2]), checkpoint=None), NEGLIGIBLE)
    split = Data.load("digits", probe=128).validation
    images = next(iter(split.batches(len(split))))[0]
    rows = {row["assembly"]: row for row in told["networks"]}
    for name, one in matched.items():
        answers = live(one.stitched, donors).eval()(images.clone()).argmax(1).numpy()
        accuracy, how = float(np.mean(answers == split.labels)), rows[name]["matching"]
        assert how["kept"] == (accuracy >= how["score_before"])
        assert rows[name]["score"] == pytest.approx(max(accuracy, how["score_before"]), abs=1e-9)
        assert (how["images"], how["seconds"]) == (one.images, one.seconds) and 0 < one.images <= 1280
        assert how["agreement"]["after"] == pytest.approx(one.after, abs=1e-6)
        assert how["agreement"]["before"] <= how["agreement"]["after"]
    text, drawn = ((folder / name).read_text() for name in ("pareto.txt", "pareto.svg"))
    shown = [row for row in rows.values() if row["front"] and row["matching"] and row["matching"]["kept"]]
    for row in shown:
        assert f"{row['spans']}  (matched, {row['matching']['score_before']:.1%} before)\n" in text
    assert text.count("  (matched, ") == len(shown)
    assert drawn.count(", matched, ") == sum((r["matching"] or {}).get("kept", False) for r in rows.values())


def test_the_command_of_a_front_is_one_that_derc_takes(matched_front):
    command = matched_front[0]["command"]
    words = shlex.split(command)
    assert words[:4] == ["derc", "pareto", "--points", "3"] and "--match 1280 --match-teacher best" in command
    given = cli.commands["pareto"].make_context("pareto", words[2:]).params
    assert (given["points"], given["match"], given["evaluations"]) == (3, "1280", 6)


def test_a_front_cannot_be_asked_for_wrongly(front, tmp_path):
    def refused(match, *words):
        with pytest.raises(UsageError, match=match):
            run("pareto", *words)

    refused("--points must be at least 2", "--points", 1, "-o", tmp_path / "p")
    refused("exists already", "-o", front[1])
    refused("--match: must be a number of images", "--match", "64x", "-o", tmp_path / "p")
    refused("did you mean 'convnext'", "--match", 64, "--match-teacher", "convnextt", "-o", tmp_path / "q")
    (tmp_path / "file").touch()
    refused("cannot be written", "-o", tmp_path / "file")
    assert not (tmp_path / "p").exists()


def test_several_budgets_give_a_bundle_each(compiled, tmp_path):
    told = run("compile", "--zoo", compiled[2], *FLAGS, "--latency-ms", "20,50", "-o", tmp_path / "out")
    assert "20 ms: " in told and "50 ms: " in told
    for name, budget in (("20ms", 20.0), ("50ms", 50.0)):
        manifest = bundle.verify(tmp_path / "out" / name)
        assert manifest["budget"]["latency_ms"] == budget and manifest["status"] == "ok"
        assert f"--latency-ms {budget}" in manifest["command"] and "20,50" not in manifest["command"]


def test_a_budget_that_nothing_meets_does_not_keep_the_others(compiled, tmp_path):
    with pytest.raises(InfeasibleError, match=r"1 of 2: 1e-06 ms: .*written to .*50ms"):
        run("compile", "--zoo", compiled[2], *FLAGS, "--latency-ms", "1e-6,50", "-o", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["50ms"]
    bundle.verify(tmp_path / "out" / "50ms")


def test_budgets_come_from_anywhere(tmp_path):
    (tmp_path / "derc.toml").write_text('latency_ms = [2, 5]\noutput = "o"\n')
    both = resolve_all({}, {}, tmp_path)
    assert [(one.latency_ms, str(one.output)) for one in both] == [(2.0, "o/2ms"), (5.0, "o/5ms")]
    assert [one.latency_ms for one in resolve_all({}, {"DERC_LATENCY_MS": "1, 3"}, tmp_path)] == [1.0, 3.0]
    (one,) = resolve_all({"latency_ms": "7"}, {"DERC_LATENCY_MS": "1, 3"}, tmp_path)
    assert one.latency_ms == 7.0 and str(one.output) == "o"
    with pytest.raises(UsageError, match="twice"):
        resolve_all({"latency_ms": "5,5.0"}, {}, None)
    for wrong in ("5,x", "5,-1", "5,"):
        with pytest.raises(UsageError, match="--latency-ms"):
            resolve_all({"latency_ms": wrong}, {}, None)
