"""The last linear map of networks: found by what it computes, replaced without a trace in the donor."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from derc import lastlayer
from derc.artifacts import FittedHead
from derc.passes.lower import lower

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trunk() -> list[nn.Module]:
    return [nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()]


def lowered(*end: nn.Module):
    torch.manual_seed(0)
    return lower(nn.Sequential(*trunk(), *end).eval(), (3, 32, 32))


def pool() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


@pytest.mark.parametrize(
    ("end", "path"),
    [
        ([*pool(), nn.Linear(6, 5)], "4"),
        ([*pool(), nn.Linear(6, 5, bias=False), nn.Dropout(0.5)], "4"),
        ([nn.Conv2d(6, 5, 1), *pool()], "2"),
        ([nn.Conv2d(6, 5, 1), nn.ReLU(), *pool()], None),
        ([nn.Conv2d(6, 5, 3), *pool()], None),
        ([*pool(), nn.Linear(6, 5), nn.Softmax(1)], None),
        ([*pool(), nn.Linear(6, 6), nn.LayerNorm(6)], None),
    ],
)
def test_it_is_found_by_what_it_computes(end, path):
    assert lastlayer.find(lowered(*end), IMAGES) == path


def test_a_map_that_is_used_twice_is_none():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x):
            return self.linear(self.linear(x[:, 0, 0, :12]).relu())

    assert lastlayer.find(lower(Twice().eval(), (3, 32, 32)), IMAGES) is None


@pytest.mark.parametrize(
    ("name", "path"),
    [("test_convnext", "head.fc"), ("test_vit", "head"), ("test_resnet", "fc"), ("test_efficientnet", "classifier")],
)
def test_it_is_found_in_timms_heads(name, path):
    module = timm.create_model(name, pretrained=False, num_classes=7, **({"img_size": 32} if "vit" in name else {}))
    network = lower(module.eval(), (3, 32, 32))
    assert lastlayer.find(network, IMAGES) == path
    assert isinstance(network.module.get_submodule(path), nn.Linear)


@pytest.mark.parametrize("convolution", [False, True])
def test_replacing_gives_the_head_and_leaves_the_shared_parts_alone(convolution):
    end = [nn.Conv2d(6, 5, 1), *pool()] if convolution else [*pool(), nn.Linear(6, 5)]
    inner = nn.Sequential(*end)
    network = nn.Sequential(nn.Sequential(*trunk()), inner).eval()
    before = network(IMAGES)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    copied = nn.Sequential(network[0], inner)
    lastlayer.replace(copied, FittedHead("1.0" if convolution else "1.2", weight, bias, "ridge", 1.0, 4, 1.0))
    features = network[0](IMAGES).mean((2, 3))
    want = features @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    torch.testing.assert_close(copied(IMAGES), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(IMAGES), before, rtol=0, atol=0)
