"""Work counted in ONNX, and the roofline that predicts latencies from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

from derc import exporting, stitching
from derc.errors import DercError
from derc.ir import Layout, TensorType
from derc.roofline import (
    DEFAULT,
    FEW,
    UNCALIBRATED,
    Calibration,
    Sample,
    calibrate,
    factors,
    features,
    fit,
    nonnegative,
)
from derc.target import Device, Target
from derc.workload import Work, model_work, slice_work, stitch_work, total
from tests.networks import images, make

CPU = Target.load("cpu", threads=1)
A100 = Target.load("a100")
COUNTS = st.integers(0, 10**10)
WORKS = st.builds(Work, st.integers(0, 1000), COUNTS, COUNTS, COUNTS)
TRUE = np.array([3.0, 0.7, 1.5, 5.0, 0.8])


def conv(name: str, source: str, cin: int, cout: int, k: int, group: int) -> tuple[onnx.NodeProto, onnx.TensorProto]:
    weight = helper.make_tensor(
        f"{name}_w", TensorProto.FLOAT, (cout, cin // group, k, k), np.zeros(cout * cin // group * k * k)
    )
    return helper.make_node("Conv", [source, f"{name}_w"], [name], pads=[k // 2] * 4, group=group), weight


def test_work_of_a_model_counted_by_hand():
    parts = [conv("a", "x", 4, 8, 3, 1), conv("r", "a_relu", 8, 8, 3, 8)]
    nodes = [
        parts[0][0],
        helper.make_node("Relu", ["a"], ["a_relu"]),
        parts[1][0],
        helper.make_node("Add", ["r", "a_relu"], ["y"]),
    ]
    info = {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT, (2, c, 5, 6))
        for n, c in (("x", 4), ("a", 8), ("a_relu", 8), ("r", 8), ("y", 8))
    }
    graph = helper.make_graph(
        nodes, "g", [info["x"]], [info["y"]], [w for _, w in parts], value_info=[info["a"], info["a_relu"], info["r"]]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    found = model_work(model.SerializeToString())
    pixels = 2 * 5 * 6
    small, large = pixels * 4, pixels * 8
    assert found.kernels == 3
    assert found.macs == large * 4 * 9
    assert found.depthwise == large * 9
    assert found.bytes == 4 * ((small + 8 * 4 * 9 + large) + (large + 8 * 9 + large) + 3 * large)


@pytest.mark.parametrize("family", ["resnet", "regnet", "mobilenet", "vit"])
def test_multiply_accumulates_are_those_that_torch_counts(family):
    network, x = make(family), images(1)
    model = exporting.export(network, x, ["output"])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(x)
    found = model_work(model)
    assert 2 * (found.macs + found.depthwise) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert (found.depthwise > 0) == (family == "mobilenet")
    assert found.bytes > 4 * sum(p.numel() for p in network.parameters() if p.dim() > 1)


def test_work_of_slices_adds_up():
    network = make("resnet")
    chain = exporting.Chain([network.conv1, network.bn1, network.layer1])
    slicer = exporting.Slicer(exporting.export(chain, images(1), ["a", "b", "c"]))
    parts = [slice_work(slicer, (a,), (b,)) for a, b in (("input", "a"), ("a", "b"), ("b", "c"))]
    assert total(parts) == slice_work(slicer, ("input",), ("c",))


def test_work_of_a_stitch_is_its_cost():
    source, target = TensorType((8, 4, 4), Layout.NCHW), TensorType((17, 12), Layout.NLC, prefix=1, grid=(4, 4))
    cost = stitching.cost(source, target)
    assert stitch_work(source, target, 3).macs == 3 * cost.macs
    assert stitch_work(source, target, 3).bytes == 4 * (3 * (8 * 16 + 17 * 12) + cost.params)


@given(WORKS, st.sampled_from(("kernels", "macs", "depthwise", "bytes")), COUNTS)
def test_more_work_is_never_faster(work, field, more):
    before = Calibration().predict(work, A100.known)
    after = Calibration().predict(work + Work(**{field: more}), A100.known)
    assert after.ms >= before.ms > 0
    assert before.low_ms < before.ms < before.high_ms
    assert before.provenance == "predicted"


@given(WORKS, st.floats(1, 100), st.sampled_from(("peaks", "bandwidth", "overhead")))
def test_a_better_device_is_never_slower(work, times, what):
    plain = {"peaks": {"fp32": 1.0}, "bandwidth": 10.0, "overhead": 5.0}
    better = {"peaks": {"fp32": times}, "bandwidth": 10 * times, "overhead": 5 / times}
    slow = Device("a", "gpu", sources={}, **plain)
    fast = Device("b", "gpu", sources={}, **{**plain, what: better[what]})
    assert Calibration().predict(work, fast).ms <= Calibration().predict(work, slow).ms * (1 + 1e-12)


def test_units_threads_and_precisions():
    device = Device("d", "cpu", {"fp32": 0.5, "int8": 2.0}, 20.0, 3.0, {}, per_thread=True)
    work = Work(kernels=7, macs=10**9, depthwise=5 * 10**8, bytes=10**8)
    assert features(work, device).tolist() == pytest.approx([0.003, 0.021, 4.0, 2.0, 5.0])
    assert features(work, device, threads=4).tolist() == pytest.approx([0.003, 0.021, 1.0, 0.5, 5.0])
    assert features(work, device, precision="int8").tolist() == pytest.approx([0.003, 0.021, 1.0, 0.5, 1.25])
    assert features(work, device, precision="fp16").tolist() == pytest.approx([0.003, 0.021, 4.0, 2.0, 2.5])
    with pytest.raises(DercError, match="fp8"):
        features(work, device, precision="fp8")


@given(st.integers(0, 10**6))
def test_nonnegative_least_squares_is_scipy_s(seed):
    random = np.random.default_rng(seed)
    rows, values = random.normal(size=(12, 4)), random.normal(size=12)
    np.testing.assert_allclose(nonnegative(rows, values), nnls(rows, values)[0], atol=1e-9)


def known(seed: int, noise: float, networks: int = 8, device: Device = CPU.known, each: int = 12) -> list[Sample]:
    """Samples whose latencies are `TRUE` factors' times, each network and each part off by log-normal noise."""
    random, found = np.random.default_rng(seed), []
    for number in range(networks):
        off = random.normal(0, noise)
        for _ in range(each):
            kernels, macs, depthwise, moved = 10 ** random.uniform([0, 5, 4, 4], [2, 9, 8, 8])
            work = Work(int(kernels), int(macs), int(depthwise), int(moved))
            ms = float(features(work, device) @ TRUE) * np.exp(off + random.normal(0, noise))
            found.append(Sample(f"n{number}", work, ms, device, "cpu", "onnxruntime"))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_calibration_recovers_known_factors(seed):
    exact = fit(known(seed, 0.0))
    assert exact.factors == pytest.approx(TRUE, rel=1e-6)
    assert (exact.low, exact.high) == pytest.approx((1, 1), abs=1e-6)
    assert fit(known(seed, 0.05, networks=30)).factors == pytest.approx(TRUE, rel=0.25)


def test_one_part_that_is_far_off_changes_little():
    samples = known(0, 0.02)
    broken = [*samples[:-1], Sample(**{**vars(samples[-1]), "ms": 50 * samples[-1].ms})]
    assert fit(broken).factors == pytest.approx(fit(samples).factors, rel=0.05)


def test_the_interval_holds_networks_that_the_fit_has_not_seen():
    held = []
    for seed in range(4):
        calibration = fit(known(seed, 0.15, networks=12))
        for one in known(seed + 100, 0.15, networks=12):
            latency = calibration.predict(one.work, one.device)
            held.append(latency.low_ms <= one.ms <= latency.high_ms)
    assert np.mean(held) > 0.9


def test_few_entries_scale_all_factors_alike():
    found = fit(known(0, 0.0, networks=1, each=5))
    assert np.ptp(np.array(found.factors) / DEFAULT) < 1e-9
    assert (found.low <= 1 / FEW, found.high >= FEW) == (True, True)


def test_what_nothing_asks_for_keeps_its_scaled_default():
    rows = np.array([features(one.work, one.device) for one in known(0, 0.0)])
    rows[:, 3] = 0
    found = factors(rows, rows @ (2 * np.array(DEFAULT)))
    assert found == pytest.approx(2 * np.array(DEFAULT), rel=1e-6)


def test_a_free_resource_keeps_a_least_share():
    rows = np.array([features(one.work, one.device) for one in known(0, 0.0)])
    assert (factors(rows, rows @ np.array([0, 0, 2.0, 8.0, 0])) > 0).all()


def test_calibration_takes_the_nearest_measurements_and_says_so():
    samples = known(0, 0.0)
    own = calibrate(CPU, samples)
    assert own.basis == "96 latencies measured on cpu with onnxruntime" and own.entries == 96
    other = calibrate(CPU, [Sample(**{**vars(one), "engine": "openvino"}) for one in samples])
    assert other.basis.endswith("cpu with another engine than onnxruntime")
    assert other.factors == own.factors and other.high >= FEW > own.high
    kind = calibrate(Target.load("h100"), known(0, 0.0, device=A100.known))
    assert kind.basis.endswith("other devices of kind gpu") and kind.factors == pytest.approx(TRUE, rel=1e-6)
    none = calibrate(A100, samples)
    assert none == Calibration() and none.high == UNCALIBRATED and "public figures" in none.basis
    with pytest.raises(DercError, match="no device description"):
        calibrate(Target("mine"), samples)
