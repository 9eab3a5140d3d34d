"""Networks of torchvision and transformers are donors like any other: lowered, cut, trained and printed exactly."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

import derc
from derc import factories
from derc.artifacts import Assembly, BlockRef
from derc.donor import Donor
from derc.emitted import realise
from derc.errors import MissingDependencyError, UsageError
from derc.passes.cut import find_cuts
from derc.passes.lower import lower
from derc.printing import print_network

TOKENS: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
TOKENS |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WINDOWS: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4]}
WINDOWS |= {"window_size": 4, "num_labels": 5, "drop_path_rate": 0.2}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "num_labels": 5}
DINO = {key: value for key, value in TOKENS.items() if key != "intermediate_size"}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 2, 3]}
NETWORKS: list[tuple[str, dict[str, Any], int]] = [
    ("transformers:ViTForImageClassification", TOKENS | DROPOUT, 32),
    ("transformers:DeiTForImageClassification", TOKENS | DROPOUT, 32),
    ("transformers:BeitForImageClassification", TOKENS | {"drop_path_rate": 0.2}, 32),
    ("transformers:Dinov2ForImageClassification", DINO | {"drop_path_rate": 0.2}, 32),
    ("transformers:Dinov2WithRegistersForImageClassification", DINO, 32),
    ("transformers:Dinov2Model", {key: value for key, value in DINO.items() if key != "num_labels"}, 32),
    ("transformers:SwinForImageClassification", WINDOWS, 32),
    ("transformers:Swinv2ForImageClassification", WINDOWS, 32),
    ("transformers:ConvNextForImageClassification", STAGES | {"drop_path_rate": 0.2}, 64),
    ("transformers:ConvNextV2ForImageClassification", STAGES | {"drop_path_rate": 0.2}, 64),
    ("transformers:ResNetForImageClassification", STAGES | {"embedding_size": 8}, 64),
    ("transformers:ResNetModel", {"hidden_sizes": [8, 12], "depths": [1, 2], "embedding_size": 8}, 64),
    ("transformers:RegNetForImageClassification", STAGES | {"embedding_size": 8, "groups_width": 4}, 64),
    ("transformers:MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "num_labels": 5}, 64),
    ("transformers:MobileViTForImageClassification", {"hidden_sizes": [16, 24, 32], "num_labels": 5}, 64),
    ("transformers:SegformerForImageClassification", PYRAMID | {"depths": [1, 1, 1, 1]}, 64),
    ("transformers:PvtForImageClassification", PYRAMID | {"depths": [1, 1, 1, 1], "image_size": 64}, 64),
    ("torchvision:resnet18", {"num_classes": 5, "width_per_group": 64}, 64),
    ("torchvision:mobilenet_v3_small", {"num_classes": 5, "width_mult": 0.25}, 64),
    ("torchvision:squeezenet1_1", {"num_classes": 5}, 64),
]


def build(factory: str, kwargs: dict[str, Any]) -> nn.Module:
    """The donor's network with its batch-norm statistics as if trained."""
    network = factories.make("d", factory, kwargs, None)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("factory", "kwargs", "side"), NETWORKS, ids=[name for name, _, _ in NETWORKS])
def test_blocks_are_the_network_in_eval_and_in_training(factory, kwargs, side):
    network = build(factory, kwargs)
    reference, x = copy.deepcopy(network), images(4, side)
    lowered = derc.lower(network, (3, side, side))
    assert len(lowered.units) >= 4
    blocks = nn.Sequential(*(lowered.block(i, i + 1) for i in range(len(lowered.units))))
    with torch.no_grad():
        assert torch.equal(blocks.eval()(x), reference(x))
    torch.manual_seed(5)
    got = blocks.train()(x)
    torch.manual_seed(5)
    want = reference.train()(x)
    assert torch.equal(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for (name, mine), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        same = mine.grad is theirs.grad is None or torch.equal(mine.grad, theirs.grad)
        assert same, name
    for (name, mine), theirs in zip(network.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


PRINTED = [network for network in NETWORKS if network[0].endswith((":ViTForImageClassification", "ResNetModel"))]
PRINTED += [network for network in NETWORKS if network[0].endswith((":SwinForImageClassification", ":resnet18"))]


@pytest.mark.parametrize(("factory", "kwargs", "side"), PRINTED, ids=[name for name, _, _ in PRINTED])
def test_the_printed_network_is_the_donor_without_derc(factory, kwargs, side):
    donor = Donor("d", factory, kwargs, input_size=(3, side, side))
    network = donor.build()
    lowered = lower(network, (3, side, side), name="d")
    lowered = lowered.with_cuts(find_cuts(lowered.graph))
    printed = print_network(Assembly((BlockRef("d", 0, len(lowered.units), 0),)), {"d": donor}, {"d": lowered}, [])
    assert f"import {factory.partition(':')[0]}\n" in printed.source and "import derc" not in printed.source
    with torch.no_grad():
        assert torch.equal(realise(printed)(images(2, side)), network(images(2, side)))


@pytest.mark.parametrize(
    ("factory", "kwargs", "words"),
    [
        ("torchvision:resnet81", {}, "donor d.*no classifier 'resnet81'.*did you mean"),
        ("torchvision:fcn_resnet50", {}, "no classifier 'fcn_resnet50'"),
        ("transformers:ViTForImageClasification", {}, "no network.*did you mean 'ViTForImageClassification'"),
        ("transformers:BertModel", {}, "BertModel does not take images"),
        ("transformers:ViTConfig", {}, "no network 'ViTConfig'"),
        ("transformers:ViTModel", {"hidden_sise": 3}, "no field 'hidden_sise'.*'hidden_size'"),
        ("transformers:ViTModel", {"hidden_size": "wide"}, "donor d.*hidden_size"),
        ("torchvision:resnet18", {"width": 3}, "width"),
    ],
)
def test_what_the_libraries_do_not_have_is_refused(factory, kwargs, words):
    with pytest.raises(UsageError, match=words) as caught:
        Donor("d", factory, kwargs).build()
    assert "\n" not in str(caught.value)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"derc\[hf\]"):
        Donor("d", "transformers:ViTModel").build()
