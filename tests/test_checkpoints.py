from __future__ import annotations

import argparse
import json
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

from derc.checkpoints import fingerprint, load, load_into
from derc.errors import UsageError


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_by_name_or_content(tmp_path, linear, name):
    save_file(linear.state_dict(), tmp_path / name)
    assert torch.equal(load(tmp_path / name).state["weight"], linear.weight)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def zeroed(state: dict) -> dict:
    return {key: value * 0 for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "remark"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, ""),
        (lambda state: {"model": {"state_dict": state}}, ""),
        (lambda state: {"state_dict": zeroed(state), "state_dict_ema": state}, "EMA weights (state_dict_ema)"),
        (lambda state: {"model": zeroed(state), "ema": {"module": state, "decay": 0.9}}, "EMA weights (ema.module)"),
        (lambda state: {"model": state, "ema": {"decay": 0.9}}, ""),
        (lambda state: {"student": zeroed(state), "teacher": state}, "EMA weights (teacher)"),
        (lambda state: {"model": prefixed("module.", state)}, ""),
        (lambda state: prefixed("module.backbone.", state), ""),
        (lambda state: prefixed("backbone.module.", state), ""),
        (lambda state: prefixed("module._orig_mod.model.encoder.", state), ""),
        (lambda state: {"state_dict": prefixed("net.", state)}, ""),
        (
            lambda state: prefixed("backbone.", state) | {"head.weight": torch.ones(3), "head.bias": torch.ones(1)},
            "2 of 4 entries are not the network's and left out",
        ),
        (
            lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(7)},
            "1 of 3 entries are not the network's and left out",
        ),
    ],
)
def test_containers_and_prefixes(tmp_path, linear, wrap, remark):
    torch.save(wrap(linear.state_dict()), tmp_path / "w.pt")
    fresh = nn.Linear(3, 2)
    assert load_into(fresh, tmp_path / "w.pt") == remark
    assert torch.equal(fresh.weight, linear.weight) and torch.equal(fresh.bias, linear.bias)


def test_names_that_are_the_networks_own_stay(tmp_path):
    network = nn.ModuleDict({"backbone": nn.Linear(3, 2), "model": nn.Linear(3, 2)})
    for prefix in ("", "module.", "backbone."):
        torch.save(prefixed(prefix, network.state_dict()), tmp_path / "w.pt")
        fresh = nn.ModuleDict({"backbone": nn.Linear(3, 2), "model": nn.Linear(3, 2)})
        assert load_into(fresh, tmp_path / "w.pt") == ""
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"bias": state["bias"]}, r"1 missing \(weight\);.*num_classes = 0"),
        (lambda state: state | {"fc.0.bias": torch.ones(1)}, r"1 unexpected \(fc.0.bias\);.*drop = \['fc.'\]"),
        (lambda state: prefixed("backbone.", {"bias": state["bias"]}), "1 missing"),
        (lambda state: prefixed("encoder_k.", state), "2 missing.*2 unexpected"),
        (lambda state: {"state_dict": {}, "ema": state | {"weight": torch.ones(5, 3)}}, "EMA weights.*another shape"),
    ],
)
def test_what_does_not_fit_leaves_the_network_as_it_was(tmp_path, linear, change, words):
    torch.save(change(nn.Linear(3, 2).state_dict()), tmp_path / "w.pt")
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        load_into(linear, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


def normed() -> nn.Sequential:
    """A network with a batch norm that has seen images."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    with torch.no_grad():
        network(torch.randn(8, 3, 5, 5) + 1)
    return network


@pytest.mark.parametrize("prefix", ["", "module."])
def test_older_state_dicts_without_the_batch_norms_counts_give_the_same_network(tmp_path, prefix):
    network, fresh = normed(), normed()
    old = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(old) == len(network.state_dict()) - 1
    torch.save(prefixed(prefix, old), tmp_path / "w.pt")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    assert load_into(fresh, tmp_path / "w.pt") == ""
    x = torch.randn(6, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), network.eval()(x), atol=0, rtol=0)
    assert fresh[1].num_batches_tracked == 0 and fresh[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("lacks", ["1.running_mean", "1.running_var", "1.weight"])
def test_what_else_a_batch_norm_lacks_is_missing(tmp_path, lacks):
    network = normed()
    torch.save(
        {n: v for n, v in network.state_dict().items() if n not in (lacks, "1.num_batches_tracked")}, tmp_path / "w"
    )
    with pytest.raises(UsageError, match=rf"1 missing \({lacks}\)"):
        load_into(network, tmp_path / "w")


def test_entries_are_left_out_where_the_user_says_so(tmp_path, linear):
    state = prefixed("module.base_encoder.", linear.state_dict() | {"fc.0.bias": torch.ones(1), "queue": torch.ones(1)})
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    assert load_into(nn.Linear(3, 2), tmp_path / "w.pt", ["fc.", "queue"]) == (
        "2 of 4 entries are not the network's and left out"
    )


def sharded(folder: Path, network: nn.Module) -> dict[str, str]:
    """Save every tensor of the network in a file of its own, with an index."""
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(network.state_dict())}
    for name, value in network.state_dict().items():
        save_file({name: value}, folder / names[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def test_shards_by_their_index_or_folder(tmp_path, linear):
    names = sharded(tmp_path, linear)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        fresh = nn.Linear(3, 2)
        assert load_into(fresh, path) == ""
        assert torch.equal(fresh.weight, linear.weight) and torch.equal(fresh.bias, linear.bias)
    before = fingerprint(tmp_path)
    save_file({"bias": linear.bias + 1}, tmp_path / names["bias"])
    assert fingerprint(tmp_path) != before
    (tmp_path / names["bias"]).unlink()
    refused(tmp_path, names["bias"], "does not exist")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": 3}'])
def test_bad_indices(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content or " ")
    refused(tmp_path, "shards" if content else "index")


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
    refused(tmp_path, "folder without model.safetensors")
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


def test_training_arguments_beside_the_weights_are_pickled_code(tmp_path, linear):
    torch.save({"model": linear.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "pickled code", "safetensors.torch.save_file")


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
