"""A donor that cannot be exported to ONNX is left out, by name and with the cause; the others are compiled."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import derc
from derc import bundle, deployed
from derc.artifacts import CutZoo, Partition
from derc.errors import UsageError
from derc.passes.profile import Profile
from derc.tabling import foresee
from derc.target import Target
from tests.conftest import small_zoo
from tests.passes.test_profile import thirds
from tests.world import make_context

SOURCE = '''
import torch
from torch import nn


class Frames(nn.Module):
    """Features of each map's spectrum, which ONNX's exporter does not know in this form."""

    def forward(self, x):
        return torch.special.airy_ai(x)


def spectral(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), Frames(), nn.Conv2d(6, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
'''


def awkward_zoo(folder: Path) -> Path:
    """An embedded donor and one with an operator that cannot be exported."""
    zoo = small_zoo(folder, "resnet-slim")
    (folder / "spectra.py").write_text(SOURCE)
    scope: dict[str, object] = {}
    exec(SOURCE, scope)
    torch.manual_seed(0)
    network = scope["spectral"](10)
    assert isinstance(network, nn.Module)
    save_file(network.state_dict(), folder / "spectral.safetensors")
    labels = [str(digit) for digit in range(10)]
    zoo.write_text(
        zoo.read_text()
        + f"""
[[donor]]
name = "spectral"
factory = "spectra:spectral"
weights = "spectral.safetensors"
input_size = [3, 32, 32]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
labels = {labels}
kwargs = {{ num_classes = 10 }}
"""
    )
    return zoo


CAUSE = r"donor spectral cannot be exported to ONNX: .*special_airy_ai"


def test_a_compile_leaves_the_donor_out_and_says_so(tmp_path, capsys):
    zoo = awkward_zoo(tmp_path)
    derc.compile(str(zoo), "digits", macs_g=0.5, out=tmp_path / "o", evaluations=1, probe=64, profile_s=2, quiet=False)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "spectral" in line]
    assert re.match("donor spectral is left out: " + CAUSE.removeprefix("donor spectral "), told)
    manifest = bundle.read(tmp_path / "o")
    failed = manifest["prediction"]["failed"]
    assert failed.keys() == {"spectral", *(f"spectral[{i}:{i + 1}]" for i in range(4))}
    assert all(re.match(CAUSE, why) for why in failed.values())
    assert manifest["donors"]["spectral"]["latency"] is None
    assert all(block["donor"] != "spectral" for block in manifest["selected"]["blocks"])
    assert not any("spectral" in one["assembly"] for one in manifest["candidates"])


@pytest.fixture
def zoo_of_two(tmp_path, monkeypatch):
    """A context, its cuts and a partition, of whose donors the one called vit cannot be exported."""
    context = make_context(tmp_path / "store", "resnet", "vit", probe=8)
    cuts = CutZoo({name: context.lowered[name].donor for name in context.zoo.names})
    blocks = {name: thirds(name, len(cuts.donors[name].units)) for name in context.zoo.names}
    real = deployed.donor_model

    def donor_model(context, name):
        if name in broken:
            raise UsageError(f"donor {name} cannot be exported to ONNX: no such operator")
        return real(context, name)

    broken = {"vit"}
    monkeypatch.setattr(deployed, "donor_model", donor_model)
    return context, cuts, Partition(blocks, 0.0, None, {}), broken


def test_what_is_foreseen_of_a_device_that_is_not_here_leaves_it_out_too(zoo_of_two):
    context, cuts, partition, _ = zoo_of_two
    absent = replace(context, target=Target.load("a100"))
    table = foresee(absent, cuts, partition).table
    assert set(table.donors) == {"resnet"}
    assert set(table.failed) == {"vit", *map(str, partition.blocks["vit"])}
    assert set(table.blocks) == set(map(str, partition.blocks["resnet"]))


def test_where_no_donor_is_left_the_first_cause_is_the_error(zoo_of_two):
    context, cuts, partition, broken = zoo_of_two
    broken.add("resnet")
    with pytest.raises(
        UsageError, match=r"no donor can be exported to ONNX: donor resnet cannot be exported .* operator"
    ):
        Profile(limit_s=1).run(context, cuts, partition)
