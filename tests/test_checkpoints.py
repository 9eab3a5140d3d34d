from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from derc.checkpoints import load_into, load_state
from derc.errors import UsageError


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_state(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_by_name_or_content(tmp_path, linear, name):
    save_file(linear.state_dict(), tmp_path / name)
    assert torch.equal(load_state(tmp_path / name)["weight"], linear.weight)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {"weight": state["weight"] * 0}, "state_dict_ema": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module.backbone.{key}": value for key, value in state.items()},
    ],
)
def test_containers_and_prefixes(tmp_path, linear, wrap):
    torch.save(wrap(linear.state_dict()), tmp_path / "w.pt")
    state = load_state(tmp_path / "w.pt")
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], linear.weight)


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pt")
    assert set(load_state(tmp_path / "w.pt")) == {"module.a", "b"}


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_code_never_runs(tmp_path, save):
    save({"weight": Trap(tmp_path / "trapped")}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "pickled code", "safetensors")
    assert not (tmp_path / "trapped").exists()


def test_a_pickled_module_is_refused(tmp_path, linear):
    torch.save(linear, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "pickled code")


def test_missing_empty_and_folder(tmp_path):
    refused(tmp_path / "none.pt", "does not exist")
    refused(tmp_path, "not a file")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "empty")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated(tmp_path, linear, share):
    whole = nn.Linear(64, 64)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        refused(tmp_path / name, "truncated")


@given(content=st.binary(min_size=1, max_size=200))
def test_any_bytes_are_refused_in_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("foreign") / "w.pt"
    path.write_bytes(content)
    refused(path)


def test_foreign_files(tmp_path):
    (tmp_path / "a.pt").write_text("<!DOCTYPE html><title>404</title>")
    refused(tmp_path / "a.pt", "checkpoint", "expected")
    torch.save([1, 2], tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "list")
    torch.save({"weight": torch.ones(1), "epoch": 3}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "epoch")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    torch.save(OrderedDict(fine=torch.ones(2), broken=torch.tensor([1.0, value])), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "broken", "NaN or infinite")


def test_load_into_is_strict_and_says_what_does_not_fit(tmp_path, linear):
    torch.save({"weight": torch.ones(5, 3), "extra": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"1 missing \(bias\); 1 unexpected \(extra\); 1 of another shape \(weight"):
        load_into(linear, tmp_path / "w.pt")


def test_load_into_loads(tmp_path, linear):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    load_into(linear, tmp_path / "w.pt")
    assert torch.equal(linear.bias, torch.load(tmp_path / "w.pt", weights_only=True)["bias"])
