"""An operator without a PyTorch form is computed by the runtime: lowered, profiled, never printed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

import derc
from derc import exporting
from derc.artifacts import Assembly, BlockRef
from derc.deployed import donor_model
from derc.donor import Donor
from derc.errors import UsageError
from derc.onnxdonor.network import build, opaque_nodes
from derc.printing import print_network
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo
from tests.onnxdonor.models import model, normal, saved
from tests.passes.test_lower import compose
from tests.world import make_context

SHAPE = ("n", 3, 32, 32)


def network_of(operator: onnx.NodeProto, **options):
    """Two convolutions, the operator from `a` to `b`, two more, and a linear head."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], strides=[4, 4]),
        helper.make_node("Conv", ["c1", "w2"], ["a"], pads=[1, 1, 1, 1]),
        operator,
        helper.make_node("Conv", ["b", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c2", "w2"], ["c3"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"]),
    ]
    weights = {"w1": 0.2 * normal(1, 8, 3, 4, 4), "w2": 0.1 * normal(2, 8, 8, 3, 3), "g": normal(3, 8, 10)}
    return model(nodes, weights, shape=SHAPE, result=("n", 10), **options)


MICROSOFT = {"domains": {"com.microsoft": 1}}
QUICK = helper.make_node("QuickGelu", ["a"], ["b"], domain="com.microsoft", alpha=1.5)
POOL = helper.make_node("LpPool", ["a"], ["b"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])


@pytest.mark.parametrize(("node", "options"), [(QUICK, MICROSOFT), (POOL, {})], ids=["QuickGelu", "LpPool"])
def test_it_is_lowered_cut_and_sliced_for_profiling(node, options, tmp_path):
    made = network_of(node, **options)
    network = build(saved(made, tmp_path))
    (opaque,) = opaque_nodes(network)
    assert opaque.kind.endswith(node.op_type)
    lowered = derc.lower(network, SHAPE[1:], name="d")
    assert len(lowered.units) >= 4
    session = onnxruntime.InferenceSession(made.SerializeToString())
    x = normal(0, 5, *SHAPE[1:])
    (want,) = session.run(None, {"x": x})
    with torch.no_grad():
        np.testing.assert_allclose(compose(lowered, torch.from_numpy(x)).numpy(), want, rtol=1e-4, atol=1e-5)
    cut = len(lowered.units)
    chain = exporting.Chain(lowered.block(i, i + 1) for i in range(cut))
    data = exporting.export(chain, torch.from_numpy(x), [f"cut_{i + 1}" for i in range(cut)], input_names=["cut_0"])
    kinds = [n.op_type for n in onnx.load_from_string(data).graph.node]
    assert kinds.count(node.op_type) == 1
    whole = onnxruntime.InferenceSession(exporting.slice_model(data, ("cut_0",), (f"cut_{cut}",)))
    np.testing.assert_allclose(whole.run(None, {"cut_0": x})[0], want, rtol=1e-4, atol=1e-5)


def test_an_assembly_without_its_block_is_printed_and_one_with_it_is_refused(tmp_path):
    donor = Donor("odd", f"onnx:{saved(network_of(QUICK, **MICROSOFT), tmp_path)}", input_size=SHAPE[1:])
    lowered = derc.lower(donor.build(), SHAPE[1:], name="odd")
    with_it = [i for i in range(len(lowered.units)) if opaque_nodes(lowered.block(i, i + 1))]
    assert len(with_it) == 1
    printed = print_network(Assembly((BlockRef("odd", 0, with_it[0], 0),)), {"odd": donor}, {"odd": lowered}, [])
    assert "QuickGelu" not in printed.source
    whole = Assembly((BlockRef("odd", 0, len(lowered.units), 0),))
    with pytest.raises(UsageError, match=r"donor odd has the operator com\.microsoft::QuickGelu, which has no PyTorch"):
        print_network(whole, {"odd": donor}, {"odd": lowered}, [])


def test_no_gradient_is_made_up(tmp_path):
    network = build(saved(network_of(QUICK, **MICROSOFT), tmp_path))
    with pytest.raises(RuntimeError, match="backward"):
        network(torch.rand(1, *SHAPE[1:])).sum().backward()


def test_several_outputs_and_constant_inputs(tmp_path):
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["values", "places"], axis=-1),
        helper.make_node("Cast", ["places"], ["floats"], to=1),
        helper.make_node("Add", ["values", "floats"], ["y"]),
    ]
    made = model(nodes, {"k": np.array([2], np.int64)})
    network = build(saved(made, tmp_path))
    x = normal(0, 3, 4, 6, 6)
    want = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})[0]
    assert len(opaque_nodes(network)) == 1
    assert torch.equal(network(torch.from_numpy(x)), torch.from_numpy(want))


def test_what_no_runtime_has_is_refused(tmp_path):
    node = helper.make_node("Foo", ["a"], ["b"], domain="my.own")
    with pytest.raises(UsageError, match=r"operator my.own::Foo has no PyTorch form, and the ONNX runtime does not"):
        build(saved(network_of(node, domains={"my.own": 1}), tmp_path))


def test_a_size_that_depends_on_the_images_is_refused(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "boxes"], ["b"]),
        helper.make_node("Slice", ["x", "zero", "one", "one"], ["part"]),
        helper.make_node("Reshape", ["part", "scores"], ["s"]),
        helper.make_node("NonMaxSuppression", ["b", "s", "most", "overlap"], ["found"]),
        helper.make_node("Cast", ["found"], ["y"], to=1),
    ]
    weights = {
        "boxes": np.array([1, 36, 4]),
        "zero": np.array([0]),
        "one": np.array([1]),
        "scores": np.array([1, 1, 36]),
        "most": np.array([5]),
        "overlap": np.array([0.3], np.float32),
    }
    with pytest.raises(UsageError, match="size of what the operator NonMaxSuppression gives depends on the images"):
        build(saved(model(nodes, weights, shape=(1, 4, 6, 6)), tmp_path))


def test_an_operator_that_changed_its_meaning_cannot_be_profiled(tmp_path):
    network = build(saved(network_of(POOL, opset=22), tmp_path))
    with pytest.raises(UsageError, match=r"LpPool of operator set 22 .* cannot be profiled in operator set 18"):
        exporting.export(network, torch.zeros(1, *SHAPE[1:]), ("y",))


def test_it_takes_part_in_profiling(tmp_path):

    donor = Donor("odd", f"onnx:{saved(network_of(QUICK, **MICROSOFT), tmp_path)}", input_size=SHAPE[1:])
    context = make_context(tmp_path / "store", "convnext")
    zoo = Zoo("test", (donor,))
    context = replace(context, zoo=zoo, lowered=LiveDonors(zoo, NEGLIGIBLE))
    model_bytes = donor_model(context, "odd")
    session = context.engine.open(exporting.slice_model(model_bytes, ("cut_1",), ("cut_3",)))
    try:
        assert session.time() > 0
    finally:
        session.close()
