"""The emitted model.py is the assembled network, bit for bit, and can be trained and given a new head."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from derc import stitching
from derc.artifacts import Assembly, BlockRef, StitchedAssembly
from derc.assembled import assemble
from derc.donor import Donor
from derc.emitted import realise
from derc.passes.emit import Emit
from derc.passes.stitch import FitStitches
from derc.printing import merged, print_network
from derc.workspace import LiveDonors
from derc.zoo import Zoo
from tests.networks import FAMILIES
from tests.world import make_context


def half(context, name, part):
    """The first or second half of a donor."""
    units = len(context.lowered[name].units)
    middle = units // 2
    return BlockRef(name, 0, middle, 0) if part == 0 else BlockRef(name, middle, units, 1)


@pytest.mark.parametrize(("front", "tail"), list(itertools.pairwise([*FAMILIES, "resnet"])))
def test_printed_network_is_the_assembled_one(tmp_path, front, tail):
    context = make_context(tmp_path, *dict.fromkeys((front, tail)))
    assembly = Assembly((half(context, front, 0), half(context, tail, 1)))
    source, target = context.lowered[front], context.lowered[tail]
    types = source.cuts[assembly.blocks[0].last].type, target.cuts[assembly.blocks[1].first].type
    assert stitching.convertible(*types)
    stitched = FitStitches().run(context, assembly)
    states = [{k: torch.from_numpy(v) for k, v in state.items()} for state in stitched.states]
    donors = {d.name: d for d in context.zoo.donors}
    printed = print_network(assembly, donors, context.lowered, states)
    network, reference = realise(printed), assemble(assembly, context.lowered, stitched.states)
    x = next(iter(context.data.validation.batches(5)))[0]
    with torch.no_grad():
        assert torch.equal(network(x.clone()), reference(x.clone()))
    assert "derc" not in {line.split()[1].split(".")[0] for line in printed.source.splitlines() if "import" in line[:7]}
    network.train()(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_consecutive_blocks_of_one_donor_print_as_one():
    parts = (BlockRef("a", 0, 2, 0), BlockRef("a", 2, 3, 1), BlockRef("b", 3, 5, 2), BlockRef("b", 5, 9, 3))
    assert merged(Assembly(parts)).blocks == (BlockRef("a", 0, 3, 0), BlockRef("b", 3, 9, 2))
    gap = Assembly((BlockRef("a", 0, 2, 0), BlockRef("a", 3, 5, 2)))
    assert merged(gap) == gap


def test_emit_gives_onnx_that_agrees_and_a_replaceable_head(tmp_path):
    context = make_context(tmp_path, "convnext", "vit")
    stitched = FitStitches().run(context, Assembly((half(context, "convnext", 0), half(context, "vit", 1))))
    emitted = Emit().run(context, stitched)
    assert emitted.parity == 0
    (tmp_path / "model.py").write_text(emitted.source)
    from safetensors.numpy import save_file

    save_file(emitted.weights, tmp_path / "weights.safetensors")
    from derc.emitted import imported

    with imported(tmp_path / "model.py") as module:
        network, other = module.build(), module.build(num_classes=3)
    x = next(iter(context.data.probe.batches(1)))[0]
    session = onnxruntime.InferenceSession(emitted.onnx.tobytes(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, network(x).numpy(), atol=1e-4)
        assert other(x).shape == (1, 3)
    assert not any(name.startswith("derc_emitted") for name in sys.modules)


def test_an_intact_donor_is_one_block(tmp_path):
    context = make_context(tmp_path, "resnet")
    units = len(context.lowered["resnet"].units)
    intact = StitchedAssembly(Assembly((BlockRef("resnet", 0, 2, 0), BlockRef("resnet", 2, units, 1))), (), ())
    emitted = Emit().run(context, intact)
    assert emitted.source.count("class Block") == 1
    assert "class Stitch" not in emitted.source


NUMBERED = """
from torch import nn

def make():
    blocks = [nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6, 6, 6)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    network.add_module("a_b", nn.Linear(4, 4))
    network.add_module("a", nn.Sequential())
    network.a.add_module("b", nn.Linear(4, 4))
    return network
"""


def test_numbered_and_colliding_names_print_as_identifiers(tmp_path):
    (tmp_path / "numbered_package.py").write_text(NUMBERED)
    donor = Donor(name="numbered", factory="numbered_package:make", folder=tmp_path, input_size=(3, 8, 8))
    lowered = LiveDonors(Zoo("own", (donor,)), 0.0)
    units = len(lowered["numbered"].units)
    printed = print_network(Assembly((BlockRef("numbered", 0, units, 0),)), {"numbered": donor}, lowered, ())
    sys.path.insert(0, str(tmp_path))
    try:
        network = realise(printed)
    finally:
        sys.path.remove(str(tmp_path))
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x), lowered["numbered"].module(x))
