"""Ridge stitches: exact where an exact one exists, and better than random on real activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from derc import stitching
from derc.artifacts import Assembly, BlockRef
from derc.assembled import assemble
from derc.data import Split
from derc.errors import DercError
from derc.ir import Layout, TensorType
from derc.passes.stitch import FitStitches, Moments, body_rows, ridge
from tests.stitches import PAIRS, build, kinds, random_value
from tests.world import make_context

KINDS = [
    TensorType((6, 8, 8), Layout.NCHW),
    TensorType((4, 4, 5), Layout.NHWC),
    TensorType((17, 7), Layout.NLC, prefix=1, grid=(4, 4)),
    TensorType((64, 4), Layout.NLC, grid=(8, 8)),
    TensorType((41, 3), Layout.NLC, prefix=5, grid=(4, 9)),
    TensorType((30, 4), Layout.NLC, prefix=2),
    TensorType((3, 7, 5), Layout.NCHW),
    TensorType((9,), Layout.NC),
]


def probe(count: int = 80) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), None)


class Project(nn.Module):
    """A fixed random linear map of the image to a value of the type."""

    def __init__(self, kind: TensorType, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        self.weight = torch.randn(192, kind.numel, generator=generator) / 14

    def forward(self, x):
        return (x.flatten(1) @ self.weight).unflatten(1, self.kind.shape)


@pytest.mark.parametrize("source", KINDS, ids=stitching.describe)
@pytest.mark.parametrize("target", KINDS, ids=stitching.describe)
def test_a_stitch_that_exists_is_found(source, target):
    truth = stitching.build(source, target)
    front = Project(source, 1)
    stitch = stitching.build(source, target)
    error = FitStitches(batch=16).fit(stitch, front, nn.Sequential(front, truth), probe(400))
    assert error < 1e-3
    x = next(iter(probe().batches(8)))[0]
    with torch.no_grad():
        want, got = truth(front(x)), stitch(front(x))
    assert (want - got).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(("before", "after"), PAIRS)
@settings(deadline=None, max_examples=12, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_what_is_fitted_is_the_least_error_of_the_stitch_itself(before, after, data, seed):
    source, target = data.draw(kinds(before)), data.draw(kinds(after))
    stitch, x, y = build(source, target), random_value(source, seed, 6), random_value(target, seed + 1, 6)
    _solve(stitch.linear, *body_rows(stitch, x, y))
    if stitch.prefix is not None:
        _solve(stitch.prefix, stitch.split(x)[1], y[:, : target.prefix].flatten(1))
    (stitch(x) - y).square().sum().backward()
    assert all(parameter.grad.abs().max() < 1e-9 * y.square().sum() for parameter in stitch.parameters())


@torch.no_grad()
def _solve(linear: nn.Linear, features: torch.Tensor, targets: torch.Tensor) -> None:
    """Ordinary least squares with intercept, straight from the rows."""
    design = np.concatenate([features.numpy(), np.ones((len(features), 1))], 1)
    found = torch.from_numpy(np.linalg.lstsq(design, targets.numpy(), rcond=None)[0])
    linear.weight.copy_(found[:-1].T)
    linear.bias.copy_(found[-1])


def test_ridge_is_the_least_squares_solution():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((50, 3))
    moments = Moments(4, 3)
    moments.add(torch.from_numpy(x[:20]), torch.from_numpy(y[:20]))
    moments.add(torch.from_numpy(x[20:]), torch.from_numpy(y[20:]))
    design = np.concatenate([x, np.ones((50, 1))], 1)
    want, residual, _, _ = np.linalg.lstsq(design, y, rcond=None)
    got = moments.solve(0.0)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-10)
    share = residual.sum() / ((y - y.mean(0)) ** 2).sum()
    assert moments.unexplained(got) == pytest.approx(share)


def test_the_penalty_is_chosen_on_what_was_held_back():
    rng = np.random.default_rng(2)
    fit, held = Moments(40, 2), Moments(40, 2)
    for moments, count in ((fit, 42), (held, 300)):
        x = torch.from_numpy(rng.standard_normal((count, 40)))
        noise = torch.from_numpy(rng.standard_normal((count, 2)))
        moments.add(x, x[:, :2] * 0.1 + noise)
    _, error = ridge(fit, held)
    assert error < held.unexplained(fit.solve(0.0))


def test_fewer_probes_than_channels_still_fit():
    source, target = TensorType((300,), Layout.NC), TensorType((5,), Layout.NC)
    front = Project(source, 1)
    stitch = stitching.build(source, target)
    error = FitStitches(batch=8).fit(stitch, front, nn.Sequential(front, stitching.build(source, target)), probe(40))
    assert np.isfinite(error)
    assert all(torch.isfinite(p).all() for p in stitch.parameters())


def test_broken_activations_are_refused():
    kind = TensorType((3, 8, 8), Layout.NCHW)
    with pytest.raises(DercError, match="not finite"):
        FitStitches().fit(stitching.build(kind, kind), nn.Identity(), nn.Threshold(2.0, float("nan")), probe())


def test_fitted_assembly_follows_the_tail_donor_better_than_random(tmp_path):
    context = make_context(tmp_path, "resnet", "vit", probe=128)
    u, v = (len(context.lowered[n].units) for n in ("resnet", "vit"))
    assembly = Assembly((BlockRef("resnet", 0, u // 2, 0), BlockRef("vit", v // 2, v, 1)))
    stitched = FitStitches().run(context, assembly)
    assert len(stitched.states) == 1
    assert stitched.residual[0] < 1
    fitted = assemble(assembly, context.lowered, stitched.states)
    torch.manual_seed(0)
    random = assemble(assembly, context.lowered)
    x = next(iter(context.data.validation.batches(64)))[0]
    with torch.no_grad():
        target = context.lowered["vit"].program.eval()(x)
        errors = [(network(x) - target).square().mean().item() for network in (fitted, random)]
    assert errors[0] < errors[1]
