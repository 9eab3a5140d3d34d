"""A device that is not here: what a compile may say of it, and `derc build` once the bundle has come to the device."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from click.testing import CliRunner

import derc
from derc import bundle
from derc.bundle import MANIFEST
from derc.cli import cli
from derc.completing import build_bundle
from derc.console import Console
from derc.errors import (
    InfeasibleError,
    IntegrityError,
    MissingDependencyError,
    OverBudgetError,
    UsageError,
)
from tests.conftest import KEPT, small_zoo

ABSENT = """
name = "mine"
description = "a board of our own"
kind = "gpu"
engine = "onnxruntime"
[match]
gpu = 'No such GPU'
[peak]
fp32 = 0.02
[memory]
bandwidth_gb_s = 10
[launch]
overhead_us = 5
[source]
peak = "its data sheet"
memory = "its data sheet"
launch = "measured"
"""
HERE = ABSENT.replace('kind = "gpu"', 'kind = "cpu"').replace("[match]\ngpu = 'No such GPU'\n", "")
QUICK = {"evaluations": 2, "probe": 64}


def run(*words):
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The file of a target of one's own, which this machine is not."""
    path = tmp_path_factory.mktemp("device") / "mine.toml"
    path.write_text(ABSENT)
    return path


@pytest.fixture(scope="module")
def foreseen(tmp_path_factory, device):
    """(bundle, result, zoo) of a compile for that target."""
    folder = tmp_path_factory.mktemp("foreseen")
    zoo = small_zoo(folder, *KEPT)
    out = folder / "out"
    result = derc.compile(str(zoo), "digits", target=str(device), latency_ms=20.0, emit="triton", out=out, **QUICK)
    return out, result, zoo


@pytest.fixture
def unbuilt(foreseen, device, tmp_path):
    """A copy of that bundle, and the target's file as it is on the device: this machine is it."""
    copy = tmp_path / "out"
    shutil.copytree(foreseen[0], copy)
    device.write_text(HERE)
    yield copy
    device.write_text(ABSENT)


def test_nothing_is_claimed_of_a_device_that_is_not_here(foreseen):
    out, result, _ = foreseen
    assert result["status"] == "unmeasured" and result["latency"]["measured_ms"] is None
    assert result["latency"]["provenance"] == "predicted" and result["target"]["present"] is False
    low, high = result["latency"]["ci95_ms"]
    assert 0 < low < result["latency"]["predicted_ms"] < high
    assert not list(out.glob("engine*")) and (out / "model.onnx").exists()
    page = (out / "report.html").read_text()
    assert "not proved: predicted, not measured" in page and "derc build" in page
    assert all(c["measured_ms"] is None for c in bundle.verify(out)["candidates"])


def test_a_budget_that_nothing_meets_says_that_it_was_predicted(foreseen, device, tmp_path):
    zoo = str(foreseen[2])
    with pytest.raises(InfeasibleError, match="predicted"):
        derc.compile(zoo, "digits", target=str(device), latency_ms=1e-6, out=tmp_path / "o", **QUICK)
    assert not (tmp_path / "o").exists()


def test_an_imported_table_makes_the_latency_recorded(foreseen, device, tmp_path, monkeypatch):
    """Profiled on the device, imported where it is not: every latency of the compile there is the table's.

    Nothing else comes over, for the store there is a new one.
    """
    table, zoo, flags = tmp_path / "table.json", str(foreseen[2]), ["--data", "digits", "--target", str(device)]
    device.write_text(HERE)
    run("profile", "--zoo", zoo, *flags, "--probe", "64", "--profile-s", "2", "-o", str(table))
    monkeypatch.setenv("DERC_CACHE", str(tmp_path / "laptop"))
    device.write_text(ABSENT)
    run("targets", "import", str(table))
    result = derc.compile(zoo, "digits", target=str(device), latency_ms=20.0, out=tmp_path / "out", **QUICK)
    assert result["status"] == "unmeasured" and result["latency"]["provenance"] == "recorded"
    rows = {row["name"]: row["ms"] for row in json.loads(table.read_text())["entries"] if row["kind"] == "donor"}
    intact = {one["assembly"]: one for one in bundle.verify(tmp_path / "out")["candidates"] if one["intact"]}
    assert len(intact) == len(rows) == len(KEPT)
    for name, one in intact.items():
        assert one["predicted_ms"] == pytest.approx(rows[name.partition("[")[0]], rel=1e-3)


def test_a_precision_that_the_stand_in_lacks_is_refused(foreseen, device, tmp_path):
    with pytest.raises(UsageError, match=r"fp16.*fp32, int8 on this machine, which is not mine"):
        derc.compile(str(foreseen[2]), "digits", target=str(device), precision="fp16", out=tmp_path / "o", **QUICK)


def test_it_is_built_on_its_device_only(foreseen):
    with pytest.raises(MissingDependencyError, match="a board of our own"):
        build_bundle(foreseen[0], 1.0, Console(quiet=True))


def test_a_build_completes_the_bundle_and_may_be_repeated(unbuilt):
    first = build_bundle(unbuilt, 2.0, Console(quiet=True))
    manifest = bundle.verify(unbuilt)
    assert first["status"] == manifest["status"] == "ok" and manifest["target"]["present"] is True
    assert manifest["latency"]["provenance"] == "measured" and 0 < manifest["latency"]["measured_ms"] < 20
    assert manifest["latency"]["foreseen"]["provenance"] == "predicted"
    assert {"engine.onnx", "engine.lock.json", "triton/derc/config.pbtxt"} <= manifest["files"].keys()
    assert "Within" in (unbuilt / "report.html").read_text()
    again = build_bundle(unbuilt, 2.0, Console(quiet=True))
    assert again["latency"]["foreseen"] == manifest["latency"]["foreseen"]
    names = [json.loads(line)["name"] for line in (unbuilt / "samples.jsonl").read_text().splitlines()]
    assert names.count("built network") == 1


def test_too_slow_on_the_device_is_said_after_the_bundle_is_complete(unbuilt):
    manifest = json.loads((unbuilt / MANIFEST).read_text())
    manifest["budget"]["latency_ms"] = 1e-4
    (unbuilt / MANIFEST).write_text(json.dumps(bundle.seal(manifest)))
    with pytest.raises(OverBudgetError, match=r"measured at .* ms here, over the budget"):
        build_bundle(unbuilt, 2.0, Console(quiet=True))
    assert bundle.verify(unbuilt)["status"] == "over_budget" and (unbuilt / "engine.onnx").exists()


def test_a_changed_bundle_is_not_built(unbuilt):
    (unbuilt / "model.onnx").write_bytes((unbuilt / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=r"model.onnx is not what derc wrote"):
        build_bundle(unbuilt, 1.0, Console(quiet=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_the_bundle_that_was_there(foreseen, tmp_path, monkeypatch, error):
    copy = tmp_path / "out"
    shutil.copytree(foreseen[0], copy)
    before, replace, calls = bundle.verify(copy), type(copy).replace, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise error("stop")
        return replace(self, target)

    monkeypatch.setattr(type(copy), "replace", interrupted)
    monkeypatch.setattr(bundle, "_exchange", lambda one, other: False)
    with pytest.raises(error):
        bundle.write(copy, {"model.py": b"x"}, {"schema": bundle.SCHEMA}, over=True)
    assert bundle.verify(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_bundle_takes_the_place_of_another(foreseen, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda one, other: False)
    copy = tmp_path / "out"
    shutil.copytree(foreseen[0], copy)
    bundle.write(copy, {"model.py": b"x"}, {"schema": bundle.SCHEMA}, over=True)
    assert {path.name for path in copy.iterdir()} == {"model.py", MANIFEST}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux only")
def test_two_folders_change_places_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert bundle._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    assert not bundle._exchange(tmp_path / "a", tmp_path / "c")
