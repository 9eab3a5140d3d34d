from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from derc.errors import DercError, MissingDependencyError, UsageError
from derc.zoo import Zoo

KWARGS = "{ num_classes = 2, channels = [8, 8, 8, 8] }"
RESNET = f'name = "a"\nfactory = "timm:resnet18"\nkwargs = {KWARGS}\ninput_size = [3, 32, 32]\n'
NETS = """
from torch import nn
def linear(n=2): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, n))
def broken(): raise RuntimeError("no such luck\\nmore")
def number(): return 3
def convolution(): return nn.Conv2d(3, 2, 3)
"""


def write(folder: Path, *tables: str) -> str:
    path = folder / "zoo.toml"
    path.write_text("".join(f"[[donor]]\n{table}\n" for table in tables))
    return str(path)


def refused(spec: str, *words: str, kind: type[DercError] = UsageError, **options) -> None:
    with pytest.raises(kind) as caught:
        Zoo.load(spec, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A zoo folder with a package of its own, forgotten again afterwards."""
    (tmp_path / "zoo_test_nets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("zoo_test_nets", None)


def user(function: str, extra: str = "", size: str = "[3, 8, 8]") -> str:
    return f'name = "u"\nfactory = "zoo_test_nets:{function}"\ninput_size = {size}\n{extra}'


def test_toml_zoo(tmp_path):
    network = timm.create_model("resnet18", num_classes=2, channels=[8, 8, 8, 8])
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pt")
    extra = 'labels = ["cat", "dog"]\nmean = [0.5, 0.5, 0.5]\nstd = [0.2, 0.2, 0.2]\nlicence = "MIT"\n'
    first = RESNET + 'weights = "w.safetensors"\n' + extra
    second = RESNET.replace('"a"', '"b"') + 'weights = "w.pt"\n'
    zoo = Zoo.load(write(tmp_path, first, second))
    assert zoo.names == ("a", "b") and zoo.name == "zoo"
    donor = zoo["a"]
    assert (donor.labels, donor.mean, donor.licence) == (("cat", "dog"), (0.5, 0.5, 0.5), "MIT")
    assert (zoo["b"].labels, zoo["b"].licence, zoo["b"].std) == (None, "unknown", (1.0, 1.0, 1.0))
    built = donor.build()
    assert not built.training and all(p.requires_grad and p.dtype == torch.float32 for p in built.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(built(images), network.eval()(images))
    assert torch.equal(zoo["b"].build()(images), built(images))
    with pytest.raises(UsageError, match=r"no donor 'aa'.*'a'"):
        zoo["aa"]


def test_user_factory_is_imported_from_the_zoo_files_folder(nets):
    before = list(sys.path)
    zoo = Zoo.load(write(nets, user("linear", "labels = 2")))
    assert sys.path == before
    assert zoo["u"].labels == ("0", "1")
    images = torch.rand(1, 3, 8, 8)
    state = torch.random.get_rng_state()
    assert torch.equal(zoo["u"].build()(images), zoo["u"].build()(images))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (user("linaer"), ("no function 'linaer'", "'linear'")),
        (user("broken"), ("broken failed", "no such luck")),
        (user("number"), ("returned a int", "torch.nn.Module")),
        (user("convolution"), ("shape", "not logits")),
        (user("linear", size="[3, 9, 9]"), ("does not run at input size (3, 9, 9)",)),
        (user("linear", "kwargs = { m = 3 }"), ("failed", "m")),
        (user("linear", "labels = 3"), ("2 outputs but 3 labels",)),
        (user("linear", 'labels = ["x", "x"]'), ("distinct",)),
        (user("linear", "labels = -1"), ("labels",)),
        (user("linear", 'labels = "none.txt"'), ("none.txt", "cannot be read")),
        (user("linear", "pretrained = true"), ("donor u", "nobody publishes weights", "as a file")),
        (user("linear", 'drop = ["fc."]'), ("drop", "weights names none")),
        (user("linear", 'weights = "none.pt"'), ("none.pt", "does not exist")),
        (user("linear", "std = [1, 0, 1]"), ("std", "positive")),
        (user("linear", "mean = [1]"), ("mean and std need 3",)),
        (user("linear", size="[3, -8, 8]"), ("three positive integers", "-8")),
        (user("linear", size="[3, 8]"), ("three positive integers",)),
        (user("linear", size="[3, 8, 8.5]"), ("input_size", "integer")),
        ('name = "u"\nfactory = "zoo_test_nets:linear"\n', ("input_size",)),
        (
            'name = "u"\nfactory = "no_such_package_here:f"\ninput_size = [3, 8, 8]',
            ("cannot import", "no_such_package"),
        ),
        ('name = "u"\nfactory = "resnet18"\ninput_size = [3, 8, 8]', ("neither timm:NAME",)),
        ('name = "u"\nfactory = "timm:resnet81"\ninput_size = [3, 8, 8]', ("no network 'resnet81'", "did you mean")),
        ('name = "u/v"\nfactory = "zoo_test_nets:linear"\ninput_size = [3, 8, 8]', ("'u/v'", "letters")),
        (user("linear", "weigths = 'x'"), ("unknown key 'weigths'", "'weights'", "donor u")),
        (user("linear", "pretrained = 'yes'"), ("pretrained", "boolean")),
        ("factory = 'timm:resnet18'", ("name", "required")),
    ],
)
def test_bad_tables(nets, table, words):
    refused(write(nets, table), *words)


def test_bad_files(tmp_path, nets):
    refused(str(tmp_path / "none.toml"), "does not exist")
    refused(write(tmp_path), "has no donors")
    refused(write(nets, user("linear"), user("linear")), "two donors called 'u'")
    (tmp_path / "zoo.toml").write_text("[[donor]\n")
    refused(str(tmp_path / "zoo.toml"), "not valid TOML")
    (tmp_path / "zoo.toml").write_text("[[donors]]\nname = 'a'\n")
    refused(str(tmp_path / "zoo.toml"), "'donors'", "did you mean 'donor'")
    (tmp_path / "zoo.toml").write_text("donor = [3]\n")
    refused(str(tmp_path / "zoo.toml"), "donor 3")
    (tmp_path / "zoo.toml").write_bytes(b"\xff\xfe")
    refused(str(tmp_path / "zoo.toml"), "UTF-8")
    refused("digit", "unknown zoo 'digit'", "did you mean 'digits'")


def test_a_package_of_the_same_name_that_was_imported_before_is_refused(nets, tmp_path_factory):
    Zoo.load(write(nets, user("linear")))
    other = tmp_path_factory.mktemp("other")
    (other / "zoo_test_nets.py").write_text(NETS)
    refused(write(other, user("linear")), "hidden by", "rename")


def test_labels_from_a_file(nets):
    (nets / "names.txt").write_text("cat\nsea lion\n\n")
    assert Zoo.load(write(nets, user("linear", 'labels = "names.txt"')))["u"].labels == ("cat", "sea lion")


def test_digest_follows_every_field_the_weights_and_the_source(nets):
    spec = write(nets, user("linear", 'weights = "w.pt"'))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).state_dict(), nets / "w.pt")
    donor = Zoo.load(spec)["u"]
    assert donor.digest() == Zoo.load(spec)["u"].digest()
    changes = [
        {"name": "v"},
        {"kwargs": {"n": 2}},
        {"mean": (0.1, 0.0, 0.0)},
        {"labels": ("a", "b")},
        {"licence": "MIT"},
    ]
    digests = {donor.digest(), *(replace(donor, **change).digest() for change in changes)}
    assert len(digests) == 1 + len(changes)
    content = bytearray((nets / "w.pt").read_bytes())
    content[-1] ^= 1
    (nets / "w.pt").write_bytes(content)
    assert replace(donor).digest() not in digests
    assert donor.digest() in digests, "a donor's digest is taken once"
    (nets / "zoo_test_nets.py").write_text(NETS + "# changed\n")
    assert replace(donor, name="v").digest() not in digests


def test_digest_of_a_donor_without_weights_is_stable(nets):
    spec = write(nets, user("linear"))
    assert Zoo.load(spec)["u"].digest() == Zoo.load(spec)["u"].digest()


def test_the_place_of_a_file_does_not_change_the_digest(tmp_path):
    network = timm.create_model("resnet18", num_classes=2, channels=[8, 8, 8, 8])
    digests = []
    for folder in (tmp_path / "x", tmp_path / "y"):
        folder.mkdir()
        save_file(network.state_dict(), folder / "w.safetensors")
        digests.append(Zoo.load(write(folder, RESNET + 'weights = "w.safetensors"'))["a"].digest())
    assert digests[0] == digests[1]


def test_timm_with_a_checkpoint(tmp_path):
    network = timm.create_model("test_resnet")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    donor = Zoo.load("timm:test_resnet", checkpoint=tmp_path / "w.safetensors")["test_resnet"]
    assert donor.input_size == (3, 160, 160) and donor.mean == (0.5, 0.5, 0.5)
    assert donor.labels is not None and len(donor.labels) == 1000 and donor.labels[0] == "n01440764"
    assert torch.equal(donor.build().state_dict()["fc.weight"], network.fc.weight)


def test_bad_timm(tmp_path):
    refused("timm:resnet81", "no network 'resnet81'", "did you mean")
    refused("timm:resnet18.nope", "no weights 'nope'", "a1_in1k")
    refused("timm:", "no network ''")
    refused("timm:resnet18,resnet34", "--checkpoint", "one network of a library", checkpoint=tmp_path / "w.pt")
    refused("digits", "--checkpoint", checkpoint=tmp_path / "w.pt")
    refused("timm:test_resnet", "does not exist", checkpoint=tmp_path / "w.pt")
    refused("timm:resnet18", "offline", "--checkpoint", kind=MissingDependencyError, offline=True)
