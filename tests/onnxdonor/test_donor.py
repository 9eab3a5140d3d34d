"""ONNX files in a zoo: named in a zoo file or on the command line, compiled, and not needed by the bundle."""

from __future__ import annotations

import pytest
import torch
from onnx import helper

import derc
from derc import bundle
from derc.errors import UsageError
from derc.sizes import SizeError, at_size
from derc.zoo import Zoo
from tests.conftest import small_zoo
from tests.networks import images
from tests.onnxdonor.models import model, normal, saved
from tests.onnxdonor.test_network import exported
from tests.onnxdonor.test_opaque import MICROSOFT, QUICK, network_of

POOLED = [("GlobalAveragePool", ["x"], "p"), ("Flatten", ["p"], "f"), ("Gemm", ["f", "w"], "y")]


def pooled(shape, classes=4, seed=0):
    nodes = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in POOLED]
    return model(nodes, {"w": normal(seed, 3, classes)}, shape=shape, result=("n", classes))


def zoo_file(folder, *tables):
    path = folder / "zoo.toml"
    path.write_text("\n".join(f"[[donor]]\n{table}" for table in tables))
    return str(path)


def test_a_zoo_file_names_a_file_beside_it(tmp_path):
    (tmp_path / "nets").mkdir()
    saved(pooled(("n", 3, 8, 8)), tmp_path / "nets")
    (donor,) = Zoo.load(zoo_file(tmp_path, 'name = "a"\nfactory = "onnx:nets/net.onnx"\nlabels = 4')).donors
    assert donor.input_size == (3, 8, 8) and donor.mean == (0, 0, 0) and donor.std == (1, 1, 1)
    assert donor.build()(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_the_command_line_names_files(tmp_path):
    paths = [saved(pooled((1, 3, 8, 8), seed=seed), tmp_path, f"net{seed}.onnx") for seed in (1, 2)]
    zoo = Zoo.load(f"onnx:{paths[0]},{paths[1]}")
    assert zoo.names == ("net1", "net2")


def test_the_digest_is_that_of_the_bytes(tmp_path):
    table = zoo_file(tmp_path, 'name = "a"\nfactory = "onnx:net.onnx"')
    digests = []
    for seed in (1, 2, 1):
        saved(pooled(("n", 3, 8, 8), seed=seed), tmp_path)
        digests.append(Zoo.load(table).donors[0].digest())
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('factory = "onnx:net.onnx"\nweights = "w.safetensors"', "donor a: an ONNX file holds its weights"),
        ('factory = "onnx:net.onnx"\npretrained = true', "an ONNX file holds its weights"),
        ('factory = "onnx:no.onnx"', "donor a: ONNX file .*no.onnx does not exist"),
        ('factory = "onnx:net.onnx"\ninput_size = [3, 9, 9]', "donor a: .*takes images"),
        ('factory = "onnx:net.onnx"\nlabels = 5', "donor a has 4 outputs but 5 labels"),
        ('factory = "onnx:open.onnx"', "donor a: .*images of any size: give input_size"),
        ('factory = "onnx:net.onnx"\nkwargs = { width = 3 }', "donor a: onnx:net.onnx failed: .*width"),
    ],
)
def test_what_does_not_fit_is_refused(table, words, tmp_path):
    saved(pooled(("n", 3, 8, 8)), tmp_path)
    saved(pooled(("n", 3, "h", "w")), tmp_path, "open.onnx")
    with pytest.raises(UsageError, match=words) as caught:
        Zoo.load(zoo_file(tmp_path, f'name = "a"\n{table}'))
    assert "\n" not in str(caught.value)


def test_another_input_size_is_taken_where_the_file_leaves_it_open(tmp_path):
    saved(pooled(("n", 3, 8, 8)), tmp_path, "fixed.onnx")
    saved(pooled(("n", 3, "h", "w")), tmp_path, "open.onnx")
    tables = ['name = "fixed"\nfactory = "onnx:fixed.onnx"', 'name = "open"\nfactory = "onnx:open.onnx"']
    tables[1] += "\ninput_size = [3, 6, 6]"
    fixed, free = Zoo.load(zoo_file(tmp_path, *tables)).donors
    assert at_size(free, (10, 12)).build()(torch.zeros(1, 3, 10, 12)).shape == (1, 4)
    with pytest.raises(SizeError, match="takes images"):
        at_size(fixed, (10, 12))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(bundle, result) of a compile of an exported network beside an embedded one."""
    folder = tmp_path_factory.mktemp("onnx")
    zoo = small_zoo(folder, "resnet-slim", "convnext")
    donor = Zoo.load(str(zoo)).donors[0]
    assert donor.name == "resnet-slim"
    exported(donor.build(), folder)
    start, end = zoo.read_text().index("[[donor]]"), zoo.read_text().index("[[donor]]", 5)
    table = '[[donor]]\nname = "file"\nfactory = "onnx:net.onnx"\nlabels = 10\n'
    table += f"mean = {list(donor.mean)}\nstd = {list(donor.std)}\n"
    zoo.write_text(zoo.read_text()[:start] + table + zoo.read_text()[end:])
    result = derc.compile(str(zoo), "digits", params_m=0.06, out=folder / "out", evaluations=2, probe=64, profile_s=1)
    (folder / "net.onnx").unlink()
    return folder / "out", result, donor


def test_a_zoo_with_a_file_compiles_to_a_bundle_without_it(compiled):
    folder, result, original = compiled
    assert "file" in {block["donor"] for block in result["selected"]["blocks"]}
    bundle.verify(folder)
    network = derc.load(folder)
    assert not {"Onnx"} & {type(module).__name__[:4] for module in network.modules()}
    assert "onnx" not in (folder / "model.py").read_text().replace("onnx:net.onnx", "")
    if result["selected"]["intact"]:
        x = images(3)
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (original.mean, original.std))
        with torch.no_grad():
            torch.testing.assert_close(network(x), original.build()((x - mean) / std), rtol=0, atol=1e-4)


def test_an_operator_without_a_pytorch_form_is_selected_and_then_refused(tmp_path):
    saved(network_of(QUICK, **MICROSOFT), tmp_path)
    zoo = zoo_file(tmp_path, 'name = "odd"\nfactory = "onnx:net.onnx"\nlabels = 10')
    with pytest.raises(UsageError, match=r"operator com\.microsoft::QuickGelu, which has no PyTorch form"):
        derc.compile(zoo, "digits", out=tmp_path / "out", probe=64, profile_s=1)
    assert not (tmp_path / "out").exists()
