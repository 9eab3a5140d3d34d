"""What derc adds to a network computes what the paper says, and costs what its price says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from derc.artifacts import Assembly, BlockRef, Head, Joint, Stem, decode, digest, encode
from derc.assembled import seeded
from derc.console import Console
from derc.errors import UsageError
from derc.ir import Layout, TensorType
from derc.parts import Part, check_joint, few, stem_type
from tests.test_resume import make_search
from tests.test_resume import world as world  # a fixture


def kind(layout, channels, height, width, prefix=0):
    """A type of `layout` with these positions."""
    match layout:
        case "NCHW":
            return TensorType((channels, height, width), Layout.NCHW)
        case "NHWC":
            return TensorType((height, width, channels), Layout.NHWC)
        case "NLC":
            return TensorType((prefix + height * width, channels), Layout.NLC, "float32", prefix, (height, width))
        case _:
            return TensorType((channels,), Layout.NC)


def values(kind, count=2):
    return torch.randn(count, *kind.shape, generator=torch.Generator().manual_seed(3))


def as_map(x, kind):
    """(N, C, H, W) of a value."""
    if kind.layout is Layout.NLC:
        x = x.reshape(len(x), *kind.grid, kind.channels)
    return x if kind.layout is Layout.NCHW else x.permute(0, 3, 1, 2)


def check_price(part, module):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = module(values(part.source, 1))
    assert tuple(found.shape[1:]) == part.target.shape
    assert part.cost.params == sum(p.numel() for p in module.parameters())
    assert part.cost.macs == counter.get_total_flops() // 2
    assert part.cost.bytes == 4 * found.numel()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("target", ["NCHW", "NHWC", "NLC"])
@pytest.mark.parametrize("source", ["NCHW", "NHWC", "NLC"])
def test_the_paper_s_stitch_between_any_maps(source, target, stride):
    before, after = kind(source, 6, 4, 6), kind(target, 5, 4 // stride, 6 // stride)
    joint = Joint("dery", stride)
    check_joint(joint, before, after)
    part = Part("stitch1", joint, before, after)
    with seeded(1):
        module = part.build().eval()
    module.norm.running_mean.uniform_(-1, 1)
    module.norm.running_var.uniform_(0.5, 2)
    check_price(part, module)
    x = as_map(values(before), before).double()
    norm = module.norm
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    x = (x - mean[:, None, None]) * scale[:, None, None]
    tiles = x.reshape(2, 6, 4 // stride, stride, 6 // stride, stride)
    want = torch.einsum("ncisjt,ocst->noij", tiles, module.conv.weight.double())
    want = torch.where(want > 0, want, 0.1 * want)
    with torch.no_grad():
        torch.testing.assert_close(as_map(module(values(before)), after).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["NHWC", "NLC"])
@pytest.mark.parametrize("source", ["NHWC", "NLC"])
def test_the_paper_s_stitch_between_tokens(source, target):
    before, after = kind(source, 6, 2, 3), kind(target, 5, 2, 3)
    check_joint(Joint("dery-fc"), before, after)
    part = Part("stitch1", Joint("dery-fc"), before, after)
    module = part.build().eval()
    check_price(part, module)
    x = values(before).reshape(2, 6, 6).double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    want = x @ module.linear.weight.double().T
    want = torch.where(want > 0, want, 0.1 * want).reshape(2, *after.shape)
    with torch.no_grad():
        torch.testing.assert_close(module(values(before)).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 50)])
def test_a_fresh_stem_is_that_of_a_resnet(size):
    stem = Stem(8, (3, *size), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    part = Part("stem", stem, TensorType(stem.image, Layout.NCHW), stem_type(stem))
    module = part.build().eval()
    check_price(part, module)
    import timm

    resnet = timm.create_model("resnet18", stem_width=8, channels=(8, 8, 8, 8)).eval()
    resnet.conv1, resnet.bn1 = module.conv, module.norm
    x = values(part.source)
    normalised = (x - torch.tensor(stem.mean)[:, None, None]) / torch.tensor(stem.std)[:, None, None]
    with torch.no_grad():
        want = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(normalised))))
        torch.testing.assert_close(module(x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "source", [kind("NCHW", 6, 2, 3), kind("NHWC", 6, 2, 3), kind("NLC", 6, 2, 3, 2), kind("NC", 6, 1, 1)]
)
def test_a_fresh_head_is_linear_in_the_mean_position(source):
    part = Part("head", Head(4), source, TensorType((4,), Layout.NC))
    module = part.build().eval()
    check_price(part, module)
    x = values(source)
    positions = x[:, source.prefix :] if source.layout is Layout.NLC else x
    last = positions.movedim(1, -1) if source.layout is Layout.NCHW else positions
    mean = last.reshape(2, -1, 6).mean(1)
    with torch.no_grad():
        torch.testing.assert_close(module(x), nn.functional.linear(mean, module.linear.weight, module.linear.bias))


@pytest.mark.parametrize(
    ("joint", "source", "target", "says"),
    [
        (Joint("dery"), kind("NCHW", 4, 4, 4), kind("NC", 4, 1, 1), "joins maps or tokens on a grid"),
        (Joint("dery"), kind("NCHW", 4, 4, 4), kind("NLC", 4, 4, 4, 1), "joins maps or tokens on a grid"),
        (Joint("dery"), TensorType((9, 4), Layout.NLC), kind("NCHW", 4, 3, 3), "joins maps or tokens on a grid"),
        (Joint("dery-fc"), kind("NCHW", 4, 4, 4), kind("NHWC", 4, 4, 4), "joins tokens on a grid"),
        (Joint("dery", 2), kind("NCHW", 4, 4, 4), kind("NCHW", 4, 4, 4), "stride 2 leads not"),
        (Joint("dery-fc"), kind("NHWC", 4, 4, 4), kind("NHWC", 4, 2, 2), "stride 1 leads not"),
        (Joint(), kind("NCHW", 4, 4, 4), TensorType((4, 4, 4), Layout.OTHER), "no stitch leads"),
    ],
)
def test_joints_that_do_not_exist_are_refused(joint, source, target, says):
    with pytest.raises(UsageError, match=says):
        check_joint(joint, source, target)


def test_an_ordinary_assembly_keeps_its_stored_form():
    """The store's keys and the manifest of a compile do not know of recipes."""
    plain = Assembly((BlockRef("a", 0, 2, 0), BlockRef("b", 1, 2, 1)))
    text, _ = encode(plain)
    blocks = '{"donor":"a","first":0,"last":2,"set":0},{"donor":"b","first":1,"last":2,"set":1}'
    assert text == f'{{"blocks":[{blocks}]}}'
    rich = Assembly(plain.blocks, (None, Joint("dery", 2)), Stem(8, (3, 4, 4), (0.0,) * 3, (1.0,) * 3), Head(10))
    assert decode(Assembly, *encode(rich)) == rich
    assert digest(rich) != digest(plain)
    assert str(rich) == "conv7x7(8) | a[0:2] | b[1:2] | linear(10)"
    assert (rich.stitched, rich.intact, rich.joint(0), rich.joint(1)) == ((True,), False, None, Joint("dery", 2))


def test_few_images_for_a_stitch_are_told_with_both_numbers():
    narrow = Part("stitch1", Joint(), kind("NCHW", 12, 4, 4), kind("NCHW", 40, 4, 4))
    wide = Part("stitch2", Joint(), kind("NLC", 20, 4, 4, prefix=1), kind("NLC", 8, 4, 4, prefix=2))
    assert few([narrow, wide], 40) == ""
    told = few([narrow, wide], 39)
    assert told.startswith("39 probe images are fewer than the 40 channels of the stitch NLC17x20p1g4x4>NLC18x8p2g4x4:")
    assert "regularised" in told and "--probe" in told
    assert few([narrow], 12) == "" and few([narrow], 11).startswith("11 probe images are fewer than the 12 channels")
    assert few([Part("stitch1", Joint("dery"), kind("NCHW", 99, 4, 4), kind("NCHW", 4, 4, 4))], 8) == ""
    assert few([], 0) == ""


class Heard(Console):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_search_says_once_that_its_probe_images_are_few(world, tmp_path):
    console = Heard()
    search = make_search(world, tmp_path, console)
    few_images = replace(search.context.data, probe=search.context.data.probe.first(16))
    search = replace(search, context=replace(search.context, data=few_images), evaluations=3)
    search.run()
    (told,) = [line for line in console.lines if "regularised" in line]
    assert re.match(r"16 probe images are fewer than the \d+ channels of the stitch N", told)
