"""Lowered networks do exactly what the untouched donor does, in eval and in train mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import derc
from derc.errors import UsageError
from derc.ir import Layout
from derc.passes.cut import find_cuts
from derc.passes.lower import lower
from tests.networks import FAMILIES, DataDependent, Functional, images, make


def compose(lowered, x):
    for index in range(len(lowered.units)):
        x = lowered.block(index, index + 1)(x)
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_order_are_the_donor_bit_for_bit(family):
    network = make(family)
    reference = copy.deepcopy(network)
    lowered = derc.lower(network, (3, 32, 32), name=family)
    assert len(lowered.units) >= 5
    assert lowered.graph.params == sum(p.numel() for p in network.parameters())
    x = images()
    with torch.no_grad():
        assert torch.equal(compose(lowered, x), reference(x))
        middle = len(lowered.units) // 2
        halves = lowered.block(middle, len(lowered.units))(lowered.block(0, middle)(x))
        assert torch.equal(halves, reference(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_donors_training(family):
    network, reference = make(family).train(), make(family).train()
    lowered = derc.lower(network, (3, 32, 32))
    assert network.training
    x = images(4)
    blocks = nn.Sequential(*(lowered.block(i, i + 1) for i in range(len(lowered.units))))
    torch.manual_seed(5)
    got = blocks(x)
    torch.manual_seed(5)
    want = reference(x)
    assert torch.equal(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for (name, mine), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(network.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_functional_network_with_shape_arithmetic():
    torch.manual_seed(0)
    network = Functional().eval()
    lowered = derc.lower(network, (3, 32, 32))
    assert len(lowered.units) >= 2
    for batch in (1, 2, 5):
        x = images(batch)
        assert torch.equal(compose(lowered, x), network(x))


def test_normalisation_becomes_the_first_op():
    network = make("resnet")
    lowered = lower(network, (3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = images()
    normal = (x - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(-1, 1, 1)
    with torch.no_grad():
        assert torch.equal(lowered.program(x), network(normal))
        lowered = lowered.with_cuts(find_cuts(lowered.graph))
        assert torch.equal(compose(lowered, x), network(normal))
        assert torch.equal(lowered.block(0, len(lowered.units))(x), network(normal))


def test_types_know_prefix_tokens_and_grids():
    kinds = [cut.type for cut in derc.lower(make("registers"), (3, 32, 32)).cuts]
    tokens = [kind for kind in kinds if kind.layout is Layout.NLC and kind.prefix]
    assert tokens and all(kind.prefix == 5 and kind.grid == (8, 8) and kind.shape == (69, 24) for kind in tokens)
    swin = [cut.type for cut in derc.lower(make("swin"), (3, 32, 32)).cuts]
    assert {kind.layout for kind in swin} >= {Layout.NHWC, Layout.NC}
    assert all(kind.spatial in ((16, 16), (8, 8)) for kind in swin[1:-1] if kind.layout is not Layout.NC)


def test_macs_are_those_of_the_convolutions():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
    graph = derc.lower(network, (3, 8, 8)).graph
    assert graph.macs == 8 * 8 * 8 * 3 * 9 + 8 * 64 * 5


@pytest.mark.parametrize(
    ("network", "word"),
    [
        (DataDependent(), "data"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(17, 5)), "traced"),
        (nn.LSTM(3, 4), "cannot be"),
    ],
)
def test_what_cannot_be_lowered_is_refused_with_the_reason(network, word):
    with pytest.raises(UsageError, match=word):
        derc.lower(network, (3, 32, 32), name="odd")


def test_nan_weights_are_named():
    network = make("resnet")
    with torch.no_grad():
        network.fc.weight[0] = float("nan")
    with pytest.raises(UsageError, match="NaN"):
        derc.lower(network, (3, 32, 32))


def test_block_bounds_are_checked():
    lowered = derc.lower(make("resnet"), (3, 32, 32))
    for first, last in ((1, 1), (-1, 2), (0, 99)):
        with pytest.raises(UsageError, match="units"):
            lowered.block(first, last)


class Latent(nn.Module):
    """Pools by attention from a learnt query, which is projected without looking at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.query = nn.Parameter(torch.zeros(1, 1, 8))
        self.project = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        query = self.project(self.query.expand(x.shape[0], -1, -1))
        x = nn.functional.scaled_dot_product_attention(query, x, x)
        return self.head(x[:, 0])


def test_learnt_queries_that_do_not_see_the_image_are_lowered():
    network = Latent().eval()
    lowered = derc.lower(network, (3, 8, 8))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(compose(lowered, x), network(x))
