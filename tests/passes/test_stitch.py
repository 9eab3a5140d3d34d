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
from derc.fitting import body_rows, fit
from derc.ir import Layout, TensorType
from derc.passes.stitch import FitStitches
from derc.regression import Moments, ridge
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


def oracle(batches: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(p + 1, q) coefficients in float64 by numpy's least squares: the penalty as rows of its own, chosen as said."""

    def solved(rows: list[tuple[np.ndarray, np.ndarray]], strength: float) -> np.ndarray:
        x, y = (np.concatenate(part) for part in zip(*rows, strict=True))
        mean_x, mean_y = x.mean(0), y.mean(0)
        penalty = strength * ((x - mean_x) ** 2).sum(0).mean()
        design = np.concatenate([x - mean_x, penalty**0.5 * np.eye(x.shape[1])])
        wanted = np.concatenate([y - mean_y, np.zeros((x.shape[1], y.shape[1]))])
        weight = np.linalg.lstsq(design, wanted, rcond=None)[0]
        return np.concatenate([weight, (mean_y - mean_x @ weight)[None]])

    fit = [rows for number, rows in enumerate(batches) if number % 4 != 3]
    held_x, held_y = (np.concatenate(part) for part in zip(*batches[3::4], strict=True))
    tried = [(strength, solved(fit, strength)) for strength in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    errors = [(np.square(held_x @ c[:-1] + c[-1] - held_y).sum(), strength) for strength, c in tried]
    return solved(batches, min(errors)[1])


@pytest.mark.parametrize("count", [24, 200])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (TensorType((14, 6), Layout.NLC, prefix=5, grid=(3, 3)), TensorType((6, 4), Layout.NLC, prefix=2, grid=(2, 2))),
        (TensorType((6, 3, 3), Layout.NCHW), TensorType((10, 5), Layout.NLC, prefix=1, grid=(3, 3))),
        (TensorType((9, 3), Layout.NLC, grid=(3, 3)), TensorType((14, 4), Layout.NLC, prefix=5, grid=(3, 3))),
    ],
    ids=["class and registers to class and register", "a map to a class token", "no prefix to class and registers"],
)
def test_class_and_register_tokens_are_those_of_float64_least_squares(source, target, count):
    """By numpy from each image's mean and prefix tokens, with fewer images than inputs and with more."""
    stitch = build(source, target)
    x, y = random_value(source, 1, count), random_value(target, 2, count)
    y[:, : target.prefix] += x.flatten(1)[:, : target.channels].unsqueeze(1)
    size = min(32, count // 4)
    error = fit(stitch, x.split(size), y.split(size))
    tokens = x.flatten(2).transpose(1, 2) if source.layout is Layout.NCHW else x
    seen = np.concatenate([tokens[:, source.prefix :].mean(1, keepdim=True), tokens[:, : source.prefix]], 1)
    rows = [(a.reshape(len(a), -1), b[:, : target.prefix].flatten(1).numpy()) for a, b in batched(seen, y, size)]
    want = oracle(rows)
    np.testing.assert_allclose(stitch.prefix.weight.detach(), want[:-1].T, atol=1e-8)
    np.testing.assert_allclose(stitch.prefix.bias.detach(), want[-1], atol=1e-8)
    if source.shape[:-1] == (9,) or source.layout is Layout.NCHW:  # no regridding: the body is rows as they are
        body = [
            (a.numpy().reshape(-1, source.channels), b[:, target.prefix :].flatten(0, 1).numpy())
            for a, b in batched(tokens, y, size)
        ]
        np.testing.assert_allclose(stitch.linear.weight.detach(), oracle(body)[:-1].T, atol=1e-8)
    assert 0 < error < 1.5


def batched(one, other, size: int):
    """Both in batches, side by side."""
    return [(one[at : at + size], other[at : at + size]) for at in range(0, len(one), size)]


@pytest.mark.parametrize("count", [8, 40, 100, 127])
def test_few_images_hold_some_back_too_and_are_regularised(count):
    """Where nothing was held back the fit's own error would choose the least penalty, and the stitch would be noise."""
    torch.manual_seed(0)
    source, target = TensorType((100,), Layout.NC), TensorType((5,), Layout.NC)
    front, donor = Project(source, 1), nn.Sequential(Project(source, 1), nn.Linear(100, 5), nn.Tanh())
    with torch.no_grad():
        donor[1].weight.copy_(torch.randn(5, 100, generator=torch.Generator().manual_seed(3)) / 30)
    stitch = stitching.build(source, target)
    FitStitches().fit(stitch, front, donor, probe(count))
    size = min(32, count // 4)
    x, y = (torch.cat([m(i) for i, _ in probe(count).batches(size)]).detach().double().numpy() for m in (front, donor))
    want = oracle(batched(x, y, size))
    np.testing.assert_allclose(stitch.linear.weight.detach(), want[:-1].T, atol=1e-4)


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
