"""A network built from an ONNX file is the one that was exported: in full, cut into blocks, trained and printed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import derc
from derc import exporting
from derc.artifacts import Assembly, BlockRef
from derc.donor import Donor
from derc.emitted import realise
from derc.errors import ParityError
from derc.onnxdonor.network import build, opaque_nodes
from derc.onnxdonor.tables import OPERATORS
from derc.passes.cut import dominators
from derc.printing import print_network
from tests.networks import images, make
from tests.onnxdonor.models import integers, model, normal, saved
from tests.passes.test_lower import compose


def exported(network: nn.Module, folder: Any, *, free: bool = False, name: str = "net.onnx") -> Any:
    """The file that torch's exporter writes, with a free batch axis or for one image."""
    shapes = ({0: torch.export.Dim("n")},) if free else None
    with exporting._quiet():
        program = torch.onnx.export(
            network, (images(2 if free else 1),), dynamo=True, dynamic_shapes=shapes, opset_version=18, verbose=False
        )
    return saved(program.model_proto, folder, name)


def lowered_donor(path: Any, name: str = "d") -> tuple[Donor, Any]:
    donor = Donor(name, f"onnx:{path}", input_size=(3, 32, 32))
    return donor, derc.lower(donor.build(), (3, 32, 32), name=name)


def printed(donor: Donor, lowered: Any, first: int = 0, last: int | None = None) -> Any:
    blocks = (BlockRef(donor.name, first, len(lowered.units) if last is None else last, 0),)
    return print_network(Assembly(blocks), {donor.name: donor}, {donor.name: lowered}, [])


@pytest.mark.parametrize("family", ["resnet", "regnet", "mobilenet", "convnext", "vit", "swin"])
def test_round_trip_is_the_network(family, tmp_path):
    original = make(family)
    path = exported(original, tmp_path, free=family in ("mobilenet", "swin"))
    donor, lowered = lowered_donor(path)
    assert not opaque_nodes(lowered.module)
    assert len(lowered.cuts) >= 5
    x = images(5)
    with torch.no_grad():
        want = original(x)
        got = lowered.module(x)
        assert torch.equal(compose(lowered, x), got)
        assert torch.equal(realise(printed(donor, lowered))(x), got)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_weights_keep_their_names_and_can_be_trained(tmp_path):
    original = make("convnext")
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.1)
    network = build(exported(original, tmp_path))
    mine, theirs = dict(network.named_parameters()), dict(original.named_parameters())
    assert set(theirs) - set(mine) <= {name for name in theirs if name.endswith(".gamma")}
    assert all(torch.equal(mine[name], theirs[name]) for name in set(mine) & set(theirs))
    network.train()(images(2)).square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_printed_source_needs_torch_alone_and_takes_a_new_head(tmp_path):
    donor, lowered = lowered_donor(exported(make("convnext"), tmp_path))
    made = printed(donor, lowered)
    (tmp_path / "model.py").write_text(made.source)
    from safetensors.torch import save_file

    save_file({k: v.detach().clone().contiguous() for k, v in made.weights.items()}, tmp_path / "weights.safetensors")
    (tmp_path / "net.onnx").unlink()
    script = (
        "import sys\nfor name in ('derc', 'onnx', 'timm', 'onnxruntime'): sys.modules[name] = None\n"
        "sys.path.insert(0, sys.argv[1]); import model, torch\n"
        "assert model.build()(torch.rand(2, 3, 32, 32)).shape == (2, 10)\n"
        "assert model.build(num_classes=4)(torch.rand(2, 3, 32, 32)).shape == (2, 4)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path)
    assert "Needs torch and safetensors;" in made.source
    assert "nn.Conv2d(3, 8," in made.source


class Squeezing(nn.Module):
    """An older exporter's style: attention whose batch is in the middle, and a class token repeated by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.attention = nn.MultiheadAttention(12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1).transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x[0])


@pytest.mark.parametrize("free", [False, True])
def test_a_batch_axis_in_the_middle_is_followed(free, tmp_path):
    torch.manual_seed(0)
    original = Squeezing().eval()
    network = build(exported(original, tmp_path, free=free))
    x = images(7)
    with torch.no_grad():
        torch.testing.assert_close(network(x), original(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_fixed_batch_size_is_made_free(batch, tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[0, 0, 1, 1], auto_pad="NOTSET"),
        helper.make_node("Reshape", ["a", "rows"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["c", "flat"], ["d"]),
        helper.make_node("Gemm", ["d", "g"], ["y"]),
    ]
    weights = {"w": normal(1, 5, 3, 2, 2), "rows": integers(batch, 5, -1), "g": normal(2, 5 * 36, 3)}
    made = model(nodes, weights | {"flat": integers(batch, 5 * 36)}, shape=(batch, 3, 6, 6))
    network = build(saved(made, tmp_path))
    run, x = ReferenceEvaluator(made).run, normal(3, 8, 3, 6, 6)
    want = np.concatenate([run(None, {"x": rows})[0] for rows in np.split(x, 8 // batch)])
    for count in (1, 3, 8):
        with torch.no_grad():
            np.testing.assert_allclose(network(torch.from_numpy(x[:count])).numpy(), want[:count], rtol=1e-4)


def test_shape_arithmetic_is_folded(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "zero"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["a"]),
        helper.make_node("Concat", ["n1", "tail"], ["wide"], axis=0),
        helper.make_node("ConstantOfShape", ["wide"], ["zeros"]),
        helper.make_node("Concat", ["a", "zeros"], ["b"], axis=1),
        helper.make_node("ReduceMax", ["b", "two"], ["top"], keepdims=0),
        helper.make_node("ArgMax", ["b"], ["where"], axis=2),
        helper.make_node("GatherElements", ["b", "where"], ["found"], axis=2),
        helper.make_node("Squeeze", ["found", "two"], ["flat"]),
        helper.make_node("Add", ["top", "flat"], ["y"]),
    ]
    weights = {"first": np.array(0), "zero": integers(0), "rest": integers(4, 36), "tail": integers(1, 36)}
    made = model(nodes, weights | {"two": integers(2)})
    network = build(saved(made, tmp_path))
    x = normal(0, 5, 4, 6, 6)
    want = ReferenceEvaluator(made).run(None, {"x": x})[0]
    np.testing.assert_allclose(network(torch.from_numpy(x)).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("axis", [2, -1])
@pytest.mark.parametrize("batch", ["n", 1])
def test_images_and_channels_in_one_axis_come_apart_again(axis, batch, tmp_path):
    nodes = [helper.make_node("Flatten", ["x"], ["a"], axis=axis), helper.make_node("Softmax", ["a"], ["b"])]
    nodes += [helper.make_node("Reshape", ["b", "s"], ["y"])]
    made = model(nodes, {"s": integers(-1 if batch == "n" else 1, 4 * 36)}, shape=(batch, 4, 6, 6))
    network = build(saved(made, tmp_path))
    run, x = ReferenceEvaluator(made).run, normal(0, 3, 4, 6, 6)
    want = np.concatenate([run(None, {"x": row[None]})[0] for row in x])
    np.testing.assert_allclose(network(torch.from_numpy(x)).numpy(), want, atol=1e-6)


def test_equal_constants_that_the_exporter_keeps_once_stay_apart(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "w"], ["a"]), helper.make_node("Mul", ["a", "w"], ["y"])]
    network = build(saved(model(nodes, {"w": normal(0, 4, 1, 1)}), tmp_path))
    assert len(list(network.parameters())) == 2


def test_local_functions_are_inlined(tmp_path):
    made = model([helper.make_node("Twice", ["x"], ["y"], domain="own")], domains={"own": 1}, result=("n", 4, 6, 6))
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    made.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))
    network = build(saved(made, tmp_path))
    x = torch.from_numpy(normal(0, 2, 4, 6, 6))
    assert torch.equal(network(x), 2 * x)


def test_a_wrong_translation_is_caught_and_named(tmp_path, monkeypatch):
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Elu", ["a"], ["b"], name="the_elu")]
    nodes += [helper.make_node("Sub", ["b", "w"], ["c"], name="wrong"), helper.make_node("Exp", ["c"], ["y"])]
    path = saved(model(nodes, {"w": normal(0, 4, 1, 1)}), tmp_path)
    monkeypatch.setitem(OPERATORS, "Sub", lambda net, op: net.call(torch.add, net.tensor(op, 0), net.tensor(op, 1)))
    with pytest.raises(ParityError, match=r"from the operator Sub \(wrong\) on"):
        build(path)


def test_a_late_token_ties_no_distant_parts_together(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c1"]),
        helper.make_node("Conv", ["c1", "w2"], ["c2"]),
        helper.make_node("Conv", ["c2", "w2"], ["c3"]),
        helper.make_node("Shape", ["c3"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["wide"], axis=0),
        helper.make_node("Expand", ["token", "wide"], ["tokens"]),
        helper.make_node("Concat", ["c3", "tokens"], ["joined"], axis=1),
        helper.make_node("GlobalMaxPool", ["joined"], ["top"]),
        helper.make_node("Flatten", ["top"], ["y"]),
    ]
    weights = {"w": normal(0, 4, 3, 8, 8), "w2": normal(1, 4, 4, 1, 1), "token": normal(2, 1, 2, 25, 25)}
    made = model(nodes, weights | {"first": integers(0), "rest": integers(2, 25, 25)}, shape=("n", 3, 32, 32))
    _, lowered = lowered_donor(saved(made, tmp_path))
    assert {"c1", "c2"} <= {name.partition("_")[0] for name in dominators(lowered.graph)}


def test_names_that_lie_in_one_another_stay_apart(tmp_path):
    names = ("a", "a.b", "a_b", "a.b.c", "0", "training", "forward.x", "::weird//name")
    nodes, value = [], "x"
    for number, name in enumerate(names):
        nodes.append(helper.make_node("Mul", [value, name], ["y" if name == names[-1] else f"v{number}"]))
        value = nodes[-1].output[0]
    weights = {name: normal(number, 3, 1, 1) for number, name in enumerate(names)}
    donor, lowered = lowered_donor(saved(model(nodes, weights, shape=("n", 3, 32, 32)), tmp_path))
    x = images(2)
    with torch.no_grad():
        assert torch.equal(realise(printed(donor, lowered))(x), lowered.module(x))
    assert len(lowered.module.state_dict()) == len(names)
