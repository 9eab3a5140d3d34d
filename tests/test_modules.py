"""Stitches between every ordered pair of layouts, held against a position-by-position computation in float64."""

from __future__ import annotations

import inspect

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import exporting, stitching
from derc.ir import Layout, TensorType
from derc.modules import Stitch
from tests.stitches import PAIRS, build, expected, kinds, random_value

each_pair = pytest.mark.parametrize(
    ("before", "after"), PAIRS, ids=lambda layout: layout.replace(" of an unknown grid", "?")
)
examples = settings(deadline=None, max_examples=24, derandomize=True)
seeds = st.integers(0, 10**6)


@each_pair
@examples
@given(data=st.data(), seed=seeds)
def test_a_stitch_is_what_its_positions_say(before: str, after: str, data: st.DataObject, seed: int) -> None:
    source, target = data.draw(kinds(before)), data.draw(kinds(after))
    stitch, x = build(source, target, seed), random_value(source, seed)
    got = stitch(x)
    assert got.shape == (2, *target.shape)
    np.testing.assert_allclose(got.detach().numpy(), expected(stitch, source, target, x), rtol=0, atol=1e-12)


@each_pair
@examples
@given(data=st.data(), seed=seeds)
def test_everything_learns_and_no_position_is_lost(before: str, after: str, data: st.DataObject, seed: int) -> None:
    source, target = data.draw(kinds(before)), data.draw(kinds(after))
    stitch, x = build(source, target, seed), random_value(source, seed, 1).requires_grad_()
    trained = stitch.train()(x)
    assert torch.equal(trained, stitch.eval()(x))
    (trained * random_value(target, seed + 1, 1)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in stitch.parameters())
    assert x.grad is not None
    body = x.grad[:, source.prefix :] if source.layout is Layout.NLC else x.grad
    channels = 1 if source.layout in (Layout.NCHW, Layout.NC) else body.ndim - 1
    assert body.abs().amax(channels).min() > 0


def test_a_grid_that_shrinks_is_averaged_so_that_all_positions_weigh_the_same() -> None:
    stitch = stitching.build(TensorType((1, 7, 5), Layout.NCHW), TensorType((1, 4, 3), Layout.NCHW))
    x = torch.zeros(35, 1, 7, 5)
    x.view(35, 35).fill_diagonal_(1)
    torch.testing.assert_close(stitch.shrink(x).mean((1, 2, 3)), torch.full((35,), 1 / 35))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_source_of_a_stitch_stands_alone_and_takes_its_weights(before: str, after: str) -> None:
    scope = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(inspect.getsource(Stitch), scope)
    stitch = stitching.build(SOURCES[before], TARGETS[after])
    alone = scope["Stitch"](**stitching.arguments(SOURCES[before], TARGETS[after]))
    alone.load_state_dict(stitch.state_dict())
    x = random_value(SOURCES[before], 0).float()
    assert torch.equal(alone(x), stitch(x))


SOURCES = {
    "NCHW": TensorType((6, 8, 6), Layout.NCHW),
    "NHWC": TensorType((5, 7, 4), Layout.NHWC),
    "NLC": TensorType((17, 5), Layout.NLC, prefix=1, grid=(4, 4)),
    "NLC of an unknown grid": TensorType((30, 4), Layout.NLC, prefix=2),
    "NC": TensorType((6,), Layout.NC),
}
TARGETS = {
    "NCHW": TensorType((5, 4, 9), Layout.NCHW),
    "NHWC": TensorType((4, 3, 3), Layout.NHWC),
    "NLC": TensorType((41, 6), Layout.NLC, prefix=5, grid=(6, 6)),
    "NLC of an unknown grid": TensorType((12, 3), Layout.NLC, prefix=1),
    "NC": TensorType((7,), Layout.NC),
}


def test_every_pair_runs_the_same_in_onnx_runtime() -> None:
    torch.manual_seed(0)
    parts = exporting.Parallel(stitching.build(SOURCES[before], TARGETS[after]) for before, after in PAIRS).eval()
    inputs = tuple(random_value(SOURCES[before], seed).float() for seed, (before, _) in enumerate(PAIRS))
    names = [f"in{place}" for place in range(len(PAIRS))]
    model = exporting.export(parts, inputs, [f"out{place}" for place in range(len(PAIRS))], input_names=names)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        want = parts(*inputs)
    for pair, a, b in zip(PAIRS, got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=1e-5, err_msg=str(pair))
