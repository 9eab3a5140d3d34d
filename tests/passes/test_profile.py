"""profile: every key, positive numbers, one export per donor; the stitch fit against scipy and a known law."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import nnls

from derc import stitching
from derc.artifacts import BlockRef, CutZoo, Latency, Partition
from derc.backends.onnxruntime import OnnxSession
from derc.errors import UnstableError, UsageError
from derc.ir import Layout, TensorType
from derc.passes.profile import Profile
from derc.slices import Slices
from derc.stitch_latency import fit, predict, spread, stitch_shapes
from tests.world import make_context

FAMILIES = ("resnet", "vit")


def thirds(name: str, count: int) -> tuple[BlockRef, ...]:
    stops = [0, count // 3, 2 * count // 3, count]
    return tuple(BlockRef(name, a, b, k) for k, (a, b) in enumerate(pairwise(stops)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    context = make_context(tmp_path_factory.mktemp("store"), *FAMILIES, probe=8)
    cuts = CutZoo({name: context.lowered[name].donor for name in FAMILIES})
    partition = Partition({name: thirds(name, len(cuts.donors[name].units)) for name in FAMILIES}, 0.0, None, {})
    return context, cuts, partition


@pytest.fixture(scope="module")
def table(world):
    context, cuts, partition = world
    return Profile(max_stitches=4, networks=4, limit_s=3.0).run(context, cuts, partition)


def maps(channels: int, side: int) -> TensorType:
    return TensorType((channels, side, side), Layout.NCHW)


def law(count: int = 30) -> dict[str, tuple[TensorType, TensorType]]:
    rng = np.random.default_rng(0)
    pairs = [(maps(*rng.integers(4, 64, 2)), maps(*rng.integers(4, 64, 2))) for _ in range(count)]
    return {stitching.key(*pair): pair for pair in pairs}


def exact(source: TensorType, target: TensorType) -> Latency:
    ms = 0.01 + stitching.cost(source, target).macs * 2e-8 + (source.numel + target.numel) * 4e-7
    return Latency(ms, ms, ms)


def test_every_block_and_donor_is_measured(world, table):
    _, _, partition = world
    assert table.donors.keys() == set(FAMILIES)
    assert table.blocks.keys() == {str(block) for blocks in partition.blocks.values() for block in blocks}
    for latency in (*table.donors.values(), *table.blocks.values()):
        assert latency.provenance == "measured" and latency.samples >= 6
        assert 0 < latency.low_ms <= latency.ms <= latency.high_ms


def test_every_stitch_has_a_latency(world, table):
    _, cuts, partition = world
    assert table.stitches.keys() == stitch_shapes(cuts, partition).keys()
    kinds = [latency.provenance for latency in table.stitches.values()]
    assert kinds.count("measured") >= 4 and set(kinds) == {"measured", "predicted"}
    for latency in table.stitches.values():
        assert 0 < latency.low_ms <= latency.ms <= latency.high_ms


def test_networks_are_measured_whole_and_predicted_from_each_other(world, table):
    assert len(table.networks) == 4 and all(one.latency and one.latency.ms > 0 for one in table.networks)
    assert table.errors.keys() >= {str(one.assembly) for one in table.networks} and len(table.errors) == 6
    assert np.median(np.abs(list(table.errors.values()))) < 0.3
    assert set(table.samples) == {
        *(f"donor {name}" for name in table.donors),
        *(f"block {name}" for name in table.blocks),
        *(f"stitch {key}" for key, latency in table.stitches.items() if latency.provenance == "measured"),
        *(f"network {one.assembly}" for one in table.networks),
    }
    assert 0 < table.timed_s <= table.measured_s and not table.failed


def test_what_cannot_be_built_ends_that_block_only(world, monkeypatch):
    """A part that the runtime cannot load is left out, with the reason; the rest is measured."""
    context, cuts, partition = world
    honest = Slices.block
    broken = str(partition.blocks["vit"][1])
    monkeypatch.setattr(Slices, "block", lambda self, b: b"no model" if str(b) == broken else honest(self, b))
    found = Profile(max_stitches=4, networks=0, limit_s=1.0).run(context, cuts, partition)
    assert list(found.failed) == [broken] and "onnxruntime failed in loading the model" in found.failed[broken]
    assert broken not in found.blocks and len(found.blocks) == 5 and found.donors.keys() == set(FAMILIES)


def test_a_machine_too_noisy_is_refused_with_the_interval(world, monkeypatch):
    context, cuts, partition = world
    rng = np.random.default_rng(0)

    def erratic(self) -> float:
        time.sleep(1e-3)
        return float(rng.lognormal(-7, 3))

    monkeypatch.setattr(OnnxSession, "time", erratic)
    with pytest.raises(UnstableError, match=r"too noisy to measure on: .* takes between [\d.]+ and [\d.]+ ms"):
        Profile(max_stitches=4, networks=0, limit_s=5.0).run(context, cuts, partition)


def test_the_table_says_where_it_holds(world, table):
    context, _, _ = world
    assert table.target == "cpu" and table.engine == context.engine.describe() and table.noise >= 0


def test_donors_are_exported_once(world, table, monkeypatch):
    context, cuts, partition = world
    monkeypatch.setattr("derc.exporting.export", pytest.fail)
    Profile(max_stitches=4, networks=4, limit_s=3.0).run(context, cuts, partition)
    exports = {entry.note for entry in context.store.entries() if entry.note.startswith("onnx")}
    assert exports == {"onnx resnet", "onnx vit", "onnx stitches"}


def test_inputs_know_donors_device_and_batch(world):
    context, _, _ = world
    base = Profile().inputs(context)
    assert base == Profile().inputs(context)
    assert base != Profile().inputs(replace(context, target=replace(context.target, batch=2)))


def test_a_donor_going_on_needs_no_stitch(world):
    _, cuts, partition = world
    alone = Partition({"resnet": partition.blocks["resnet"]}, 0.0, None, {})
    blocks = partition.blocks["resnet"]
    gap = cuts.donors["resnet"].cuts
    only = stitching.key(gap[blocks[0].last].type, gap[blocks[2].first].type)
    assert set(stitch_shapes(cuts, alone)) == {only}


def test_spread_takes_both_ends_and_is_deterministic():
    shapes = law()
    macs = {key: stitching.cost(*pair).macs for key, pair in shapes.items()}
    keys = spread(shapes, 8)
    assert keys == spread(shapes, 8) and len(set(keys)) == 8
    assert {max(macs, key=lambda k: macs[k])} <= set(keys)
    assert spread(shapes, 100) == sorted(shapes)


def test_prediction_recovers_a_linear_law():
    shapes = law()
    measured = {key: exact(*shapes[key]) for key in spread(shapes, 8)}
    table = predict(shapes, measured)
    assert table.keys() == shapes.keys()
    for key, latency in table.items():
        assert latency.ms == pytest.approx(exact(*shapes[key]).ms, rel=1e-6)
        assert latency.provenance == ("measured" if key in measured else "predicted")


def test_prediction_interval_covers_noise():
    shapes, rng = law(60), np.random.default_rng(1)
    truth = {key: exact(*pair).ms * rng.lognormal(0, 0.2) for key, pair in shapes.items()}
    table = predict(shapes, {key: Latency(truth[key], truth[key], truth[key]) for key in spread(shapes, 24)})
    guesses = {key: latency for key, latency in table.items() if latency.provenance == "predicted"}
    inside = [latency.low_ms <= truth[key] <= latency.high_ms for key, latency in guesses.items()]
    assert np.mean(inside) >= 0.8


def test_fit_is_the_non_negative_least_squares_solution():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, times = np.c_[np.ones(12), rng.random((12, 2))], rng.random(12)
        np.testing.assert_allclose(fit(rows, times), nnls(rows, times)[0], atol=1e-9)


def test_too_few_stitches_for_a_fit():
    with pytest.raises(UsageError, match="at least 4"):
        Profile(max_stitches=3)
