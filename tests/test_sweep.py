"""Several budgets at once, and the Pareto front: work is shared, the front is measured, and nothing dominates it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from derc import bundle
from derc.cli import cli
from derc.config import resolve_all
from derc.errors import InfeasibleError, UsageError
from derc.pareto import FILES
from derc.sweep import hypervolume

FLAGS = ("--data", "digits", "--evaluations", "6", "--probe", "128", "--profile-s", "4", "-q")


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


def test_the_front_is_written_as_table_json_and_plot(front):
    told, folder = front
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert json.loads((folder / "pareto.json").read_text()) == told
    text = (folder / "pareto.txt").read_text()
    assert all((row["spans"] in text) == row["front"] for row in told["networks"])
    drawn = ElementTree.parse(folder / "pareto.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == len(told["networks"])


def test_a_front_cannot_be_asked_for_wrongly(front, tmp_path):
    def refused(match, *words):
        with pytest.raises(UsageError, match=match):
            run("pareto", *words)

    refused("--points must be at least 2", "--points", 1, "-o", tmp_path / "p")
    refused("exists already", "-o", front[1])
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
