"""Models of fixed shapes as torch modules, in any number format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper

from derc import halffloat
from derc.errors import DercError
from derc.exporting import export
from derc.onnxdonor.fixed import module
from tests.networks import FAMILIES, images, make
from tests.onnxdonor.models import model, normal


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit", "swin"])
def test_a_network_comes_back_as_it_was(family):
    network, x = make(family), images(2)
    with torch.no_grad():
        found, shape = module(export(network, x, ["y"]))
        assert shape == (2, 3, 32, 32) and family in FAMILIES
        torch.testing.assert_close(found(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_weights_of_16_bits_stay_so(precision, bits):
    network, x = make("vit"), images(2)
    with torch.no_grad():
        whole, _ = module(export(network, x, ["y"]))
        half, _ = module(halffloat.rewrite(export(network, x, ["y"]), precision))
        want, got = whole(x), half(x)
    assert {value.dtype for value in half.parameters()} == {{11: torch.float16, 8: torch.bfloat16}[bits]}
    assert got.dtype == torch.float32
    relative = float((got - want).norm() / want.norm())
    assert 0 < relative < 2.0**-bits * 20  # some 400 roundings, each of 2 ** -bits / sqrt(3) at most, in quadrature


@pytest.mark.parametrize("shape", [(2, 5, 8), (4, 8), (1, 64, 4, 4)])
def test_inputs_of_any_rank(shape):
    weight = normal(0, shape[-1], 8)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, shape=shape)
    x = normal(1, *shape)
    found, given = module(proto.SerializeToString())
    assert given == shape
    np.testing.assert_allclose(found(torch.from_numpy(x)).detach(), x @ weight, rtol=1e-5, atol=1e-5)


def test_what_works_across_the_batch_is_no_donor_but_a_block():
    proto = model([helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])], shape=(3, 4))
    x = torch.rand(3, 4)
    assert torch.equal(module(proto.SerializeToString())[0](x), x.T)


@pytest.mark.parametrize(
    ("proto", "said"),
    [
        (model([helper.make_node("Relu", ["x"], ["y"])]), "leaves a size of its input open"),
        (
            model([helper.make_node("Add", ["x", "z"], ["y"])], inputs=("x", "z"), shape=(1, 2)),
            "2 inputs and 1 outputs",
        ),
        (model([helper.make_node("Identity", ["w"], ["y"])], {"w": normal(0, 2)}, shape=(1, 2)), "gives a constant"),
        (
            model([helper.make_node("Nope", ["x"], ["y"], domain="odd")], shape=(1, 4, 6, 6), domains={"odd": 1}),
            "odd::Nope",
        ),
        (
            model([helper.make_node("Det", ["x"], ["y"])], shape=(1, 4, 6, 6), result=(1, 4)),
            r"without a PyTorch form \(Det\): use another engine",
        ),
    ],
)
def test_what_cannot_be_a_module_is_said_in_one_sentence(proto, said):
    with pytest.raises(DercError, match=said) as caught:
        module(proto.SerializeToString())
    assert "\n" not in str(caught.value)
