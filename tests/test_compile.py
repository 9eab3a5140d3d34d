"""The compile end to end, on real donors: what it writes, what it claims, and that it is never worse than a donor."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

import derc
from derc import bundle
from derc.data import Data
from derc.errors import InfeasibleError, OverBudgetError, UsageError
from derc.text import parse_graph
from tests.conftest import small_zoo

NEEDED = {
    "status": str,
    "target": dict,
    "budget": dict,
    "selected": dict,
    "latency": dict,
    "accuracy": dict,
    "solver": dict,
    "timings_s": dict,
    "artifacts": dict,
}


def test_result_has_every_key_and_is_json(compiled):
    _, result, _ = compiled
    for name, kind in NEEDED.items():
        assert isinstance(result[name], kind), name
    assert json.loads(json.dumps(result)) == result
    assert set(result["latency"]) >= {"predicted_ms", "measured_ms", "ci95_ms", "provenance"}
    assert set(result["accuracy"]) >= {"validation", "heldout", "random_stitch_heldout", "donors"}
    assert set(result["solver"]) == {"name", "status", "objective", "bound", "gap", "evaluations"}
    assert set(result["timings_s"]) >= {"lower", "cut", "embed", "partition", "profile", "select", "emit", "package"}


def test_only_a_measurement_claims_the_budget(compiled):
    _, result, _ = compiled
    assert result["status"] == "ok"
    assert result["latency"]["provenance"] == "measured"
    assert result["latency"]["ci95_ms"][1] <= 50


def test_never_worse_on_validation_than_the_best_intact_donor(compiled):
    folder, result, _ = compiled
    manifest = bundle.read(folder)
    intact = [c["validation"] for c in manifest["candidates"] if c["intact"]]
    assert len(intact) == 3
    assert result["accuracy"]["validation"] >= max(intact)


def test_an_intact_answer_is_the_best_intact_donor(compiled):
    _, result, _ = compiled
    best = result["accuracy"]["best_intact_within_budget"]
    if result["selected"]["intact"]:
        assert result["selected"]["blocks"][0]["donor"] == best["donor"]
        assert result["accuracy"]["heldout"] == best["heldout"]
    assert best["measured_ms"] <= 50


def test_bundle_is_whole_and_its_module_is_what_was_reported(compiled):
    folder, result, _ = compiled
    manifest = bundle.verify(folder)
    assert set(bundle.FILES) <= set(manifest["files"])
    network = derc.load(folder)
    heldout = Data.load("digits").heldout
    images, labels = next(iter(heldout.batches(1000)))
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(result["accuracy"]["heldout"], abs=1e-6)
    plan = parse_graph((folder / "plan.txt").read_text())
    assert plan.params == sum(p.numel() for p in network.parameters()) == result["selected"]["params"]


def test_engine_and_onnx_agree_with_the_module(compiled):
    folder, _, _ = compiled
    x = next(iter(Data.load("digits").validation.batches(1)))[0]
    with torch.no_grad():
        want = derc.load(folder)(x).numpy()
    for name in ("model.onnx", "engine.onnx"):
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, want, atol=1e-4)
    parity = json.loads((folder / "manifest.json").read_text())["parity"]
    assert max(parity["module_onnx"], parity["onnx_engine"], parity["module_engine"]) <= parity["tolerance"]


def test_model_py_works_without_derc(compiled, tmp_path):
    folder, _, _ = compiled
    script = (
        "import sys; sys.modules['derc'] = None; sys.path.insert(0, sys.argv[1]); import model, torch\n"
        "n = model.build(); assert n(torch.rand(2, 3, 32, 32)).shape == (2, 10)\n"
        "assert model.build(num_classes=4)(torch.rand(2, 3, 32, 32)).shape == (2, 4)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=tmp_path)


def test_a_second_budget_reuses_everything_but_the_search(compiled, tmp_path):
    folder, first, zoo = compiled
    slow = first["accuracy"]["donors"]
    ms = bundle.read(folder)["donors"]
    budget = 1.3 * min(ms[name]["latency"]["ms"] for name in slow)
    result = derc.compile(
        str(zoo), "digits", latency_ms=budget, out=tmp_path / "o", evaluations=4, probe=128, profile_s=4, threads=1
    )
    reused = bundle.read(tmp_path / "o")["reused"]
    assert {"lower", "cut", "embed", "partition", "profile"} <= set(reused)
    assert result["latency"]["ci95_ms"][1] <= budget
    best = result["accuracy"]["best_intact_within_budget"]
    assert best is None or set(best) == {"donor", "heldout", "recalibrated", "heldout_as_it_came", "measured_ms"}


def test_a_zoo_of_one_donor_compiles_to_itself(tmp_path):
    zoo = small_zoo(tmp_path, "convnext")
    result = derc.compile(str(zoo), "digits", out=tmp_path / "o", probe=64, profile_s=4, threads=1)
    assert result["selected"]["intact"]
    assert {b["donor"] for b in result["selected"]["blocks"]} == {"convnext"}
    assert result["accuracy"]["random_stitch_heldout"] is None
    assert result["accuracy"]["heldout"] == result["accuracy"]["donors"]["convnext"]["heldout"]


def test_budgets_of_size_bind(compiled, tmp_path):
    _, _, zoo = compiled
    result = derc.compile(
        str(zoo),
        "digits",
        params_m=0.12,
        macs_g=0.003,
        out=tmp_path / "o",
        evaluations=3,
        probe=128,
        profile_s=4,
        threads=1,
    )
    assert result["selected"]["params"] <= 120_000
    assert result["selected"]["macs"] <= 3_000_000


def test_images_without_labels_compile_by_agreement(compiled, tmp_path):
    _, _, zoo = compiled
    images = np.concatenate([split.images for split in (Data.load("digits").probe, Data.load("digits").validation)])
    np.savez(tmp_path / "x.npz", x=images)
    result = derc.compile(
        str(zoo), f"npz:{tmp_path / 'x.npz'}", out=tmp_path / "o", evaluations=2, probe=128, profile_s=4, threads=1
    )
    accuracy = result["accuracy"]
    assert accuracy["heldout"] is accuracy["validation"] is accuracy["random_stitch_heldout"] is None
    assert bundle.read(tmp_path / "o")["candidates"][0]["agreement"] is not None


def test_an_impossible_budget_names_the_fastest_and_writes_nothing(compiled, tmp_path):
    _, _, zoo = compiled
    with pytest.raises(InfeasibleError, match=r"fastest that is achievable is 0\.\d+ ms"):
        derc.compile(str(zoo), "digits", latency_ms=1e-4, out=tmp_path / "o", probe=128, profile_s=4, threads=1)
    assert not (tmp_path / "o").exists()


def test_labels_that_no_head_knows_are_refused_where_none_may_be_fitted(tmp_path):
    zoo = small_zoo(tmp_path, "resnet-rotation")
    with pytest.raises(UsageError, match="labels"):
        derc.compile(str(zoo), "digits", out=tmp_path / "o", head="donor")


def test_over_budget_is_an_error_of_its_own():
    assert OverBudgetError.exit_code == 7
    assert not issubclass(OverBudgetError, InfeasibleError)
