"""Exports and slices, held against torch by running both."""

from __future__ import annotations

import logging
import warnings
from itertools import pairwise

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from torch import nn

import derc
from derc.backends.onnxruntime import OnnxRuntime
from derc.errors import DercError, UsageError
from derc.exporting import OPSET, Chain, Parallel, Slicer, export, join, slice_model
from tests.networks import make


class Shifted(nn.Module):
    """Adds a value that is computed from a buffer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.arange(4.0))

    def forward(self, x):
        return x + torch.sin(self.ramp * 2).view(1, 4, 1, 1)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def awkward() -> list[nn.Module]:
    """Units whose cuts coincide: identities, an in-place ReLU, dropout, a module used for nothing but its shape."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    return [
        nn.Identity(),
        conv,
        nn.ReLU(inplace=True),
        nn.Identity(),
        Shifted(),
        nn.Dropout(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    ]


def chain(units: list[nn.Module], x: torch.Tensor) -> bytes:
    return export(Chain(units), x, [f"cut_{i + 1}" for i in range(len(units))], input_names=["cut_0"])


def run(model: bytes, *inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {node.name: value for node, value in zip(session.get_inputs(), inputs, strict=True)}
    (output,) = session.run(None, feeds)
    return output


def test_export_agrees_with_torch_and_is_static():
    network, x = make("resnet"), torch.randn(2, 3, 32, 32)
    model = export(network, x, ["logits"])
    proto = onnx.load_from_string(model)
    assert [opset.version for opset in proto.opset_import if not opset.domain] == [OPSET]
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 32, 32]
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "logits"]
    np.testing.assert_allclose(run(model, x.numpy()), network(x).detach(), atol=1e-5)


def test_equal_modules_give_equal_bytes():
    x = torch.randn(1, 3, 4, 4)
    assert chain(awkward(), x) == chain(awkward(), x)


def test_modes_come_back_and_nothing_is_printed(capfd):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout().eval(), nn.BatchNorm2d(4)).train()
    network[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(network, torch.randn(1, 3, 4, 4), ["y"])
    assert [part.training for part in network.modules()] == [True, True, False, True]
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_what_cannot_be_exported_is_one_sentence(capfd):
    with pytest.raises(UsageError, match=r"Branching cannot be exported to ONNX: .*data-dependent") as caught:
        export(Branching(), torch.randn(1, 3), ["y"])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_in_place_units_do_not_change_the_cut_before_them():
    units, x = awkward(), torch.randn(1, 3, 4, 4)
    model = chain(units, x)
    conv = run(slice_model(model, ("cut_0",), ("cut_2",)), x.numpy())
    assert conv.min() < 0
    np.testing.assert_allclose(conv, units[1](x).detach(), atol=1e-6)


def test_every_slice_agrees_with_torch():
    units, x = awkward(), torch.randn(1, 3, 4, 4)
    slicer = Slicer(chain(units, x))
    with torch.no_grad():
        for unit in units:
            unit.eval()
        for first in range(len(units)):
            for last in range(first + 1, len(units) + 1):
                start = nn.Sequential(*units[:first])(x).clone()
                model = slicer.slice((f"cut_{first}",), (f"cut_{last}",))
                expected = nn.Sequential(*units[first:last])(start.clone())
                np.testing.assert_allclose(run(model, start.numpy()), expected, atol=1e-6)


def test_a_slice_has_its_own_weights_only():
    units, x = awkward(), torch.randn(1, 3, 4, 4)
    model = chain(units, x)
    names = [
        {weight.name for weight in onnx.load_from_string(slice_model(model, (a,), (b,))).graph.initializer}
        for a, b in (("cut_0", "cut_2"), ("cut_2", "cut_8"), ("cut_8", "cut_9"))
    ]
    assert names[0] == {"blocks.1.weight", "blocks.1.bias"}
    assert names[2] == {"blocks.8.weight", "blocks.8.bias"}
    assert names[0].isdisjoint(names[1]) and names[1].isdisjoint(names[2])


@pytest.mark.parametrize("family", ["resnet", "swin"])
def test_slices_compose_to_the_donor(family):
    lowered = derc.lower(make(family), (3, 32, 32), name=family)
    x = torch.randn(1, 3, 32, 32)
    count = len(lowered.units)
    slicer = Slicer(chain([lowered.block(i, i + 1) for i in range(count)], x))
    stops = sorted({0, count // 3, 2 * count // 3, count})
    value = x.numpy()
    for first, last in pairwise(stops):
        value = run(slicer.slice((f"cut_{first}",), (f"cut_{last}",)), value)
    np.testing.assert_allclose(value, run(slicer.slice(("cut_0",), (f"cut_{count}",)), x.numpy()), atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(value, lowered.module(x), atol=1e-5)


def test_parallel_holds_many_modules():
    parts, inputs = [nn.Linear(2, 3), nn.Linear(4, 5)], (torch.randn(1, 2), torch.randn(1, 4))
    slicer = Slicer(export(Parallel(parts), inputs, ["out 0", "out 1"], input_names=["in 0", "in 1"]))
    for i, (part, x) in enumerate(zip(parts, inputs, strict=True)):
        model = slicer.slice((f"in {i}",), (f"out {i}",))
        np.testing.assert_allclose(run(model, x.numpy()), part(x).detach(), atol=1e-6)


def test_slicing_what_does_not_separate():
    model = export(
        Parallel([nn.Linear(2, 3), nn.Linear(2, 3)]), (torch.randn(1, 2),) * 2, ["u", "v"], input_names=["a", "b"]
    )
    with pytest.raises(DercError, match="also needs 'a'"):
        slice_model(model, ("b",), ("u",))
    with pytest.raises(DercError, match="no value 'nowhere'"):
        slice_model(model, ("nowhere",), ("u",))


def test_inner_graphs_take_along_what_they_capture():
    text = """
      <ir_version: 10, opset_import: ["" : 18]>
      g (float[2] x) => (float[2] z) <float[2] w = {1, 2}, bool c = {1}> {
        y = Relu(x)
        k = Exp(w)
        z = If(c) <then_branch = t () => (float[2] p) { q = Mul(y, k) p = Add(q, q) },
                   else_branch = e () => (float[2] r) { r = Neg(y) }>
      }
    """
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = slice_model(proto.SerializeToString(), ("y",), ("z",))
    graph = onnx.load_from_string(model).graph
    assert [node.op_type for node in graph.node] == ["Exp", "If"]
    np.testing.assert_allclose(run(model, np.array([1, 1], np.float32)), 2 * np.exp([1.0, 2.0]), rtol=1e-6)


class Windows(nn.Module):
    """Attention in windows of a batch, on five axes or three, with a mask of each kind."""

    def __init__(self, mask: torch.Tensor | None, axes: int) -> None:
        super().__init__()
        self.mask, self.axes = mask, axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.reshape(x.shape[0], 4, 6, 2, 8).transpose(2, 3)
        q = q if self.axes == 5 else q.flatten(0, 2)
        return nn.functional.scaled_dot_product_attention(q, q.flip(-1), q + 1, attn_mask=self.mask, scale=0.5)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [(5, None), (5, (6, 6)), (5, (4, 1, 6, 6)), (5, (1, 4, 2, 6, 6)), (3, None), (3, (6, 6)), (3, (24, 6, 6))],
)
def test_attention_over_other_than_four_axes_exports(axes, shape):
    torch.manual_seed(0)
    module = Windows(None if shape is None else torch.randn(shape), axes)
    x = torch.rand(3, 4 * 6, 16)
    want = module(x)
    np.testing.assert_allclose(run(export(module, x, ("output",)), x.numpy()), want, atol=1e-6)


def test_joined_slices_are_the_whole():
    """Slices of an export, joined again, compute what the module computes; so do parts of different networks."""
    network = make("resnet")
    lowered = derc.lower(network, (3, 32, 32))
    count = len(lowered.units)
    chain = Chain(lowered.block(i, i + 1) for i in range(count))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = export(chain, images, [f"cut_{i}" for i in range(1, count + 1)], input_names=["cut_0"])
    middle = count // 2
    parts = [slice_model(model, (f"cut_{a}",), (f"cut_{b}",)) for a, b in ((0, middle), (middle, count))]
    joined = join(parts)
    graph = onnx.load_from_string(joined).graph
    assert [graph.input[0].name, graph.output[0].name] == ["input", "output"]
    session = OnnxRuntime(threads=1).open(joined)
    np.testing.assert_allclose(session.run(images.numpy()), network(images).detach(), atol=1e-5)
    assert joined == join(parts)
    with pytest.raises(DercError, match="not one input and one output"):
        join([model])


CLAMPS = {
    "method": lambda x: x.clamp(0, 127 / 128),
    "function": lambda x: torch.clamp(x, min=-1, max=0.5),
    "keyword": lambda x: torch.clip(input=x, min=-0.5, max=1),
    "alias": lambda x: x.clip(-1, 0.3),
    "in place": lambda x: (x + 0).clamp_(0, 0.7),
    "one bound": lambda x: x.clamp(min=0),
    "unbounded": lambda x: x.clamp(0, float("inf")),
    "integers": lambda x: (x * 9).long().clamp(0, 5).float(),
    "rounded": lambda x: (x * 9).long().clamp(0, 2.5),
}


class Clamped(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return CLAMPS[self.name](x)


@pytest.mark.parametrize("name", CLAMPS)
def test_bounds_of_two_types_export_to_the_bit(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    got = run(export(Clamped(name), x, ["y"]), x.numpy())
    want = Clamped(name)(x).numpy()
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_a_network_that_clamps_between_an_integer_and_a_real_number_is_cut_and_exported():
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 8, 3),
        Clamped("method"),
        nn.Conv2d(8, 8, 3),
        Clamped("alias"),
        nn.Flatten(),
        nn.Linear(512, 10),
    ]
    network = nn.Sequential(*parts).eval()
    lowered = derc.lower(network, (3, 12, 12))
    units = [lowered.block(i, i + 1) for i in range(len(lowered.units))]
    x = torch.rand(2, 3, 12, 12)
    slicer = Slicer(chain(units, x))
    got = run(slicer.slice(("cut_0",), (f"cut_{len(units)}",)), x.numpy())
    np.testing.assert_allclose(got, network(x).detach(), atol=1e-5)
