"""A planned recipe is the network that one would build by hand from the same donors."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from derc.artifacts import CutDonor
from derc.assembled import assemble, seeded
from derc.config import resolve
from derc.console import Console
from derc.errors import UsageError
from derc.inspection import show_zoo
from derc.outcome import plan_graph
from derc.parts import parts
from derc.planning import Plan, plan
from derc.recipe import read_recipe
from derc.text import parse_graph, print_graph, type_text
from derc.zoo import Zoo
from tests.networks import FAMILIES
from tests.recipes import PLAIN, STITCHED, write_recipe

PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "recipes" / "dery_4_50_10.toml"


def planned(folder: Path, text: str, *families: str) -> Plan:
    recipe = read_recipe(write_recipe(folder, text, *families))
    return plan(recipe, Zoo.load(recipe.zoo))


def donor(family):
    """What the factory of the zoo file makes, without derc."""
    name, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10, **options).eval()


class ByHand(nn.Module):
    """`STITCHED` in plain torch."""

    def __init__(self):
        super().__init__()
        resnet, swin = donor("resnet"), donor("swin")
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.adapt1 = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 24, 1, bias=False), nn.LeakyReLU(0.1))
        self.adapt2 = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24, bias=False), nn.LeakyReLU(0.1))
        self.adapt3 = nn.Sequential(nn.BatchNorm2d(24), nn.Conv2d(24, 12, 2, 2, bias=False), nn.LeakyReLU(0.1))
        self.adapt4 = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 24, 1, bias=False), nn.LeakyReLU(0.1))
        self.fc = nn.Linear(24, 5)
        self.added = nn.ModuleList([self.stem, self.adapt1, self.adapt2, self.adapt3, self.adapt4, self.fc])
        self.layer1 = resnet.layer1
        self.blocks = swin.layers[1].blocks
        self.middle = nn.Sequential(resnet.layer2[1], resnet.layer3[0])
        self.late = resnet.layer4[1]

    def forward(self, x):
        mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.6, 0.7])
        x = self.layer1(self.stem((x - mean[:, None, None]) / std[:, None, None]))
        x = self.blocks[0](self.adapt1(x).permute(0, 2, 3, 1))
        x = self.blocks[1](self.adapt2(x))
        x = self.middle(self.adapt3(x.permute(0, 3, 1, 2)))
        return self.fc(self.late(self.adapt4(x)).mean((2, 3)))


def images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def graph_of(made: Plan):
    return plan_graph(made.assembly, {name: CutDonor(one.cuts, one.units) for name, one in made.lowered.items()})


def test_a_recipe_gives_the_network_built_by_hand(tmp_path):
    made = planned(tmp_path, STITCHED)
    with seeded(3):
        network = assemble(made.assembly, made.lowered)
    hand = ByHand().eval()
    added = [
        module
        for part, module in zip(parts(made.assembly, made.lowered), network.parts, strict=True)
        if part.kind != "block"
    ]
    for mine, theirs in zip(added, hand.added, strict=True):
        weights = [value for value in mine.state_dict().items() if "normalize" not in value[0]]
        names = list(theirs.state_dict())
        assert len(weights) == len(names)
        theirs.load_state_dict(dict(zip(names, (value for _, value in weights), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(network(images()), hand(images()), rtol=0, atol=1e-6)
    total = sum(p.numel() for p in hand.parameters())
    assert sum(p.numel() for p in network.parameters()) == total == graph_of(made).params


def test_the_plan_says_what_really_runs(tmp_path):
    made = planned(tmp_path, STITCHED)
    graph = graph_of(made)
    graph.verify()
    assert parse_graph(print_graph(graph)) == graph
    with seeded(0):
        network = assemble(made.assembly, made.lowered)
    x = images(1)
    for op, module in zip(graph.ops, network.parts, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = module(x)
        assert tuple(x.shape[1:]) == op.type.shape, op.name
        assert sum(p.numel() for p in module.parameters()) == op.params, op.name
        assert counter.get_total_flops() // 2 == op.macs, op.name
    assert [op.kind for op in graph.ops[:2]] == ["stem", "block"]
    assert graph.types["block4"].stride == (16, 16)


def test_donors_own_ends_and_a_linear_stitch(tmp_path):
    made = planned(tmp_path, PLAIN)
    first, last = made.assembly.blocks
    assert (first.first, last.last) == (0, len(made.lowered["vit"].units))
    assert [part.kind for part in parts(made.assembly, made.lowered)] == ["block", "stitch", "block"]
    resnet, vit = donor("resnet"), donor("vit")
    normalised = (images() - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
        :, None, None
    ]
    with torch.no_grad():
        want = resnet.layer2[0](resnet.layer1(resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(normalised))))))
        torch.testing.assert_close(made.lowered["resnet"].block(first.first, first.last)(images()), want)
        tokens = torch.rand(2, 65, 24)
        want = vit.forward_head(vit.norm(vit.blocks[3](vit.blocks[2](tokens))))
        torch.testing.assert_close(made.lowered["vit"].block(last.first, last.last)(tokens), want)


def test_unit_numbers_are_those_of_zoo_show(tmp_path):
    made = planned(tmp_path, PLAIN.replace('"layer1"', "1").replace('"layer2.0"', "4"))
    shown, _ = show_zoo(resolve({"zoo": str(tmp_path / "zoo.toml")}, {}, None), Console(quiet=True))
    block, row = made.assembly.blocks[0], shown["donors"]["resnet"]["cuts"][5]
    cut = made.lowered["resnet"].cuts[block.last]
    assert (cut.name, type_text(cut.type)) == (row["value"], row["type"])


def test_units_that_follow_each_other_need_no_stitch(tmp_path):
    text = PLAIN.replace("layer2.0", "layer1.1").replace("vit", "resnet").replace("blocks.2", "layer2.0")
    made = planned(tmp_path, text.replace("blocks.3", "layer4"))
    assert made.assembly.intact
    with torch.no_grad():
        torch.testing.assert_close(
            assemble(made.assembly, made.lowered)(images()), made.lowered["resnet"].program(images()), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('donor = "vit"', 'donor = "vitt"', ["block 2", "no donor 'vitt'", "did you mean 'vit'"]),
        ("blocks.3", "blocks.33", ["block 2", "no module 'blocks.33'", "did you mean"]),
        ('"blocks.3"', "99", ["block 2", "no unit 99", "0 to"]),
        ('"layer1"', "-1", ["block 1", "no unit -1"]),
        ("layer2.0", "layer2.0.conv1", ["block 1", "output of layer2.0.conv1 is no cut", "layer2.0"]),
        ("blocks.2", "blocks.2.mlp", ["block 2", "input of blocks.2.mlp is no cut", "blocks.2"]),
        ('first = "layer1"', 'first = "layer3"', ["block 1", "'layer3' comes after last = 'layer2.0'"]),
        ('last = "blocks.3"', 'last = "blocks.3"\nstitch = "dery"', ["block 2", "dery stitch joins", "linear"]),
        (
            '"blocks.2"\nlast = "blocks.3"',
            '"fc_norm"\nlast = "head"\ngrid = "keep"',
            ["block 2", "positions on both sides"],
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(tmp_path, old, new, says):
    assert old in PLAIN
    with pytest.raises(UsageError) as caught:
        planned(tmp_path, PLAIN.replace(old, new))
    for words in says:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stem_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UsageError, match="block 1: the stem gives NCHW32x8x8 where NCHW64x8x8 is wanted"):
        planned(tmp_path, STITCHED.replace("channels = 64", "channels = 32"))
    text = STITCHED.replace("channels = 64", "channels = 32").replace(
        'last = "layer1.1"', 'last = "layer1.1"\nstitch = "linear"'
    )
    made = planned(tmp_path, text)
    kinds = [part.kind for part in parts(made.assembly, made.lowered)]
    assert kinds[:3] == ["stem", "stitch", "block"]


def test_a_transformer_keeps_the_grid_that_it_gets(tmp_path):
    """ResNet's 4×4 maps give the ViT 16 patch tokens where it has 64 itself."""
    made = planned(tmp_path, PLAIN.replace('last = "blocks.3"', 'last = "blocks.3"\ngrid = "keep"'))
    assert made.assembly.donors == ("resnet", "vit@16x16")
    assert graph_of(made).types["stitch1"].shape == (17, 24)
    with torch.no_grad():
        assert assemble(made.assembly, made.lowered)(images()).shape == (3, 10)


def test_the_image_size_brings_every_donor_to_it(tmp_path):
    made = planned(tmp_path, "image_size = 64\n" + PLAIN)
    assert made.image == (3, 64, 64)
    assert graph_of(made).types["block0"].shape == (12, 8, 8)
    with torch.no_grad():
        assert assemble(made.assembly, made.lowered)(torch.rand(1, 3, 64, 64)).shape == (1, 10)


def test_the_paper_s_stride_must_lead_to_the_block_s_grid(tmp_path):
    with pytest.raises(UsageError, match=r"block 4: a dery stitch of stride 1 leads not from NHWC8x8x24 to NCHW12x4x4"):
        planned(tmp_path, STITCHED.replace("stride = 2\n", ""))


def test_the_published_network_has_its_parameters_and_macs():
    """DeRy(4,50,10): 40,414,054 parameters by its authors' configuration; 6.43 G by mmcv, which counts norms too."""
    recipe = read_recipe(PUBLISHED)
    made = plan(recipe, Zoo.load(recipe.zoo, check=lambda _: None))
    graph = graph_of(made)
    assert graph.params == 40_414_054
    assert 6.38e9 < graph.macs < 6.43e9
