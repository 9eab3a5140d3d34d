"""Published weights come from the local caches first, and offline from nowhere else; no test touches the network."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from derc import hub
from derc.donor import Donor
from derc.errors import MissingDependencyError, UsageError
from derc.zoo import Zoo

REVISION = "0123456789abcdef0123456789abcdef01234567"
VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of hub and torch.hub, and no way out."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def publish(caches: Path, repository: str) -> Path:
    """A repository's folder in the local hub cache, as the hub's client lays it out."""
    root = caches / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    snapshot = root / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(7)
    made: nn.Module = timm.create_model("resnet18", **kwargs)
    return made


@pytest.mark.parametrize("offline", [True, False])
def test_timm_weights_are_those_of_the_local_cache(caches, offline):
    save_file(network().state_dict(), publish(caches, "timm/resnet18.a1_in1k") / "model.safetensors")
    donor = Zoo.load("timm:resnet18.a1_in1k", offline=offline)["resnet18.a1_in1k"]
    state, want = donor.build().state_dict(), network().state_dict()
    assert all(torch.equal(state[name], want[name]) for name in want) and len(state) == len(want)


def test_a_headless_network_takes_the_backbone_of_published_weights(caches):
    save_file(network().state_dict(), publish(caches, "timm/resnet18.a1_in1k") / "model.safetensors")
    donor = Donor("d", "timm:resnet18.a1_in1k", {"num_classes": 0}, pretrained=True, offline=True)
    assert torch.equal(donor.build().state_dict()["conv1.weight"], network().state_dict()["conv1.weight"])
    with pytest.raises(UsageError, match=r"donor d.*1000 classes, not 10.*take 0"):
        Donor("d", "timm:resnet18.a1_in1k", {"num_classes": 10}, pretrained=True, offline=True).build()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:resnet18", r"donor resnet18.*hub cache of timm/resnet18.a1_in1k.*offline.*--checkpoint"),
        ("torchvision:resnet18", r"resnet18-f37072fd.pth is not there.*offline.*--checkpoint"),
        ("transformers:google/vit-base-patch16-224", r"google/vit-base-patch16-224.*offline"),
    ],
)
def test_what_is_not_in_the_caches_is_refused_at_once(spec, words):
    start = time.perf_counter()
    with pytest.raises(MissingDependencyError, match=words) as caught:
        Zoo.load(spec, offline=True)
    assert time.perf_counter() - start < 10 and caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("cannot connect"), "no connection to the hub for timm/resnet18.a1_in1k"),
        (OSError("disk is full"), "disk is full"),
    ],
)
def test_an_unreachable_hub_is_a_missing_dependency(monkeypatch, error, words):
    def download(*_: object, local_files_only: bool = False, **__: object) -> None:
        raise LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(MissingDependencyError, match=words):
        Donor("d", "timm:resnet18", pretrained=True).build()


def test_torchvision_weights_are_those_of_torch_hubs_cache(caches):
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    want = torchvision.models.densenet121()
    old = {
        name.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1").replace("conv2", "conv.2")
        if "denselayer" in name
        else name: value
        for name, value in want.state_dict().items()
    }
    torch.save(old, folder / "densenet121-a639ec97.pth")
    donor = Zoo.load("torchvision:densenet121", offline=True)["densenet121"]
    assert donor.labels is not None and donor.labels[0] == "n01440764" and donor.input_size == (3, 224, 224)
    state = donor.build().state_dict()
    assert all(torch.equal(state[name], value) for name, value in want.state_dict().items())


def test_torchvision_tags():
    with pytest.raises(UsageError, match=r"no weights 'IMAGENET1K_V7' of resnet50.*IMAGENET1K_V2"):
        Zoo.load("torchvision:resnet50.IMAGENET1K_V7", offline=True)
    with pytest.raises(MissingDependencyError, match="resnet50-0676ba61"):
        hub.torchvision_state("resnet50.IMAGENET1K_V1", offline=True)
