"""A transformers network in a folder or in the hub's cache is a donor with its weights, labels and normalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file

from derc.donor import Donor
from derc.errors import DercError, UsageError
from derc.zoo import Zoo
from tests.test_hub import publish

CONFIG: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
CONFIG |= {"image_size": 32, "patch_size": 8}
LABELS = {0: "cat", 1: "dog", 2: "sea lion"}
PROCESSOR = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": {"height": 9}}
OLD = (("layers", "encoder.layer"), ("o_proj", "output.dense"), ("mlp.fc1", "intermediate.dense"))
OLD += (("mlp.fc2", "output.dense"), ("q_proj", "attention.query"), ("k_proj", "attention.key"))
OLD += (("v_proj", "attention.value"),)


def network(**more: Any) -> Any:
    torch.manual_seed(7)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG, id2label=LABELS, **more)).eval()


def save(folder: Path, made: Any, *, shard: str = "1GB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(folder, max_shard_size=shard)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def zoo(folder: Path, name: str, extra: str = "") -> Zoo:
    (folder / "zoo.toml").write_text(f'[[donor]]\nname = "d"\nfactory = "transformers:{name}"\n{extra}')
    return Zoo.load(str(folder / "zoo.toml"), offline=True)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder(tmp_path, shard):
    made = network()
    save(tmp_path / "my-vit", made, shard=shard)
    assert (tmp_path / "my-vit" / "model.safetensors").exists() == (shard == "1GB")
    donor = zoo(tmp_path, "./my-vit")["d"]
    assert donor.input_size == (3, 32, 32) and donor.labels == ("cat", "dog", "sea lion")
    assert donor.mean == (0.5, 0.4, 0.3) and donor.std == (0.2, 0.2, 0.2) and donor.source == "my-vit"
    assert (
        donor.kwargs.items() >= {**CONFIG, "num_labels": 3}.items()
        and donor.factory == "transformers:ViTForImageClassification"
    )
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(donor.build()(x), made(x).logits)
    before = donor.digest()
    save(tmp_path / "my-vit", network(hidden_act="relu"), shard=shard)
    assert zoo(tmp_path, "./my-vit")["d"].digest() != before


def test_a_repository_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = network()
    save(publish(tmp_path, "some/vit"), made)
    x = torch.rand(2, 3, 32, 32)
    for donor in (zoo(tmp_path, "some/vit")["d"], Zoo.load("transformers:some/vit", offline=True)["some-vit"]):
        assert donor.pretrained and donor.source == "some/vit"
        with torch.no_grad():
            assert torch.equal(donor.build()(x), made(x).logits)


def test_names_of_older_versions(tmp_path):
    made = network()
    old = {}
    for name, value in made.state_dict().items():
        for new, before in OLD if ".layers." in name else ():
            name = name.replace(new, before)
        old[name] = value
    assert "vit.encoder.layer.0.attention.attention.query.weight" in old
    save_file(old, tmp_path / "w.safetensors")
    donor = Donor(
        "d", "transformers:ViTForImageClassification", CONFIG | {"num_labels": 3}, weights=tmp_path / "w.safetensors"
    )
    state = donor.build().state_dict()
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items())
    for harm, words in (("classifier.weight", r"1 missing \(classifier.weight\)"), ("x.y", r"1 unexpected \(x.y\)")):
        save_file({**old, "x.y": torch.ones(1)} if harm == "x.y" else without(old, harm), tmp_path / "w.safetensors")
        with pytest.raises(UsageError, match=f"donor d.*{words}"):
            donor.build()


def without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key != name}


def test_the_backbone_of_a_classifier(tmp_path):
    made = network()
    save(tmp_path / "vit", made)
    kwargs = CONFIG | {"add_pooling_layer": False}
    donor = Donor("d", "transformers:ViTModel", kwargs, weights=tmp_path / "vit")
    with pytest.raises(UsageError, match=r"2 unexpected.*drop = \['classifier.'\]"):
        donor.build()
    donor = Donor("d", "transformers:ViTModel", kwargs, weights=tmp_path / "vit", drop=("classifier.",))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(donor.build()(x), made.vit(x).last_hidden_state.mean(1))


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("./none", {}, "none does not exist"),
        ("./m", {"config.json": "{"}, "config.json cannot be read as JSON"),
        ("./m", {"config.json": "[]"}, "not a JSON object"),
        ("./m", {"config.json": "{}"}, "names no architecture"),
        ("./m", {"config.json": '{"architectures": ["BertModel"]}'}, "does not take images"),
        ("./m", {"config.json": '{"architectures": ["ViTModel"]}'}, "how images are normalised"),
        ("./m", {"config.json": '{"architectures": ["ViTModel"]}', "preprocessor_config.json": "{}"}, "normalised"),
        (
            "./m",
            {
                "config.json": '{"architectures": ["ViTModel"]}',
                "preprocessor_config.json": '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}',
            },
            "folder without model.safetensors",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, name, files, words):
    for file, text in files.items():
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / file).write_text(text)
    with pytest.raises(DercError, match=f"donor d.*{words}") as caught:
        zoo(tmp_path, name)
    assert "\n" not in str(caught.value)
