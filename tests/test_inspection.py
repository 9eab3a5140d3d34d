"""`derc zoo show` tells a zoo's structure without its weights, and the paper's zoo is one of timm's tags."""

from __future__ import annotations

import socket

import pytest
import timm
import torch

from derc.config import resolve
from derc.console import Console
from derc.inspection import show_zoo
from derc.store import Store
from derc.zoo import PRESETS, Zoo


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_published_weights_are_not_loaded(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("DERC_CACHE", str(tmp_path / "store"))
    tables = [("a", "tv_in1k"), ("b", "a1_in1k"), ("c", "gluon_in1k")]
    text = "".join(
        f'[[donor]]\nname = "{name}"\nfactory = "timm:resnet18.{tag}"\npretrained = true\n' for name, tag in tables
    )
    (tmp_path / "zoo.toml").write_text(text)
    settings = resolve({"zoo": str(tmp_path / "zoo.toml"), "input_size": "64"}, {}, None)
    plain, shown = show_zoo(settings, Console(quiet=True))
    params = sum(p.numel() for p in timm.create_model("resnet18").parameters())
    assert [donor["params"] for donor in plain["donors"].values()] == [params] * 3
    assert len(Store.default(say=print).entries()) == 1, "one architecture is lowered once"
    for donor in plain["donors"].values():
        assert donor["weights"] == "published, not loaded" and donor["input_size"] == [3, 64, 64]
        assert sum(unit["params"] for unit in donor["units"]) == params
        assert len(donor["cuts"]) == len(donor["units"]) + 1
    assert plain["donors"]["a"]["cuts"][2]["path"] == "layer1.0"
    lines = shown.splitlines()
    assert lines[1] == (
        f"weights: not loaded for 3 donors, costs do not depend on them; about {12 * params / 1e9:.2f} GB to download"
    )
    assert sum(line.startswith(("a  ", "b  ", "c  ")) for line in lines) == 3
    assert any(line.endswith(" layer3") and "float32[256x4x4]" in line for line in lines)


def test_the_papers_zoo_is_all_timm(no_network):
    zoo = Zoo.load("dery24", check=lambda _: None)
    assert len(zoo.donors) == 24 and {donor.input_size for donor in zoo.donors} == {(3, 224, 224)}
    assert all(donor.pretrained and timm.is_model_pretrained(donor.factory[5:]) for donor in zoo.donors)
    heads = {donor.labels for donor in zoo.donors if donor.labels is not None}
    assert len(heads) == 1 and len(next(iter(heads))) == 1000
    assert [donor.name for donor in zoo.donors if donor.labels is None] == [
        "vit-small-dino",
        "vit-base-dino",
        "vit-base-mae",
    ]


def test_a_preset_needs_images_and_headless_donors_give_features(tmp_path):
    assert resolve({"zoo": "dery24"}, {}, tmp_path).lacks_data and not resolve({}, {}, tmp_path).lacks_data
    assert set(PRESETS) == {"digits", "dery24"}
    network = timm.create_model("vit_small_patch16_224.dino").eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 384)


SHARED = """
import torch
from torch import nn

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        x = torch.relu(self.two(torch.relu(self.three(x))))
        return self.head(x.mean((2, 3)))

def make():
    return Twice()
"""


def test_weights_that_forbid_a_cut_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DERC_CACHE", str(tmp_path / "store"))
    (tmp_path / "sharing_package.py").write_text(SHARED)
    text = '[[donor]]\nname = "twice"\nfactory = "sharing_package:make"\ninput_size = [3, 8, 8]\n'
    (tmp_path / "zoo.toml").write_text(text)
    plain, shown = show_zoo(resolve({"zoo": str(tmp_path / "zoo.toml")}, {}, None), Console(quiet=True))
    assert len(plain["donors"]["twice"]["remarks"]) == 2
    assert "no cut between two and two_1: they share two.weight" in shown
