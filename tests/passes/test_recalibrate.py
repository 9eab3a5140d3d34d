"""Recalibrated batch norms against torch's own way to estimate them, and when they are kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from benchmarks.contexts import open_context
from derc import layered, stitching
from derc.artifacts import Assembly, BlockRef, LatencyTable
from derc.assembled import live
from derc.compiler import analyse
from derc.config import resolve
from derc.data import Data, Split
from derc.judge import logits
from derc.passes.recalibrate import Recalibrate
from derc.passes.score import Consult, Score
from derc.passes.select import Select
from derc.passes.stitch import FitStitches
from derc.pipeline import Context, Timings
from derc.search import Judged, Search
from derc.workspace import NEGLIGIBLE, LiveDonors
from derc.zoo import Zoo
from tests.zoos import latency

FRONT, TAIL = "convnext", "effnet"


@pytest.fixture(scope="module")
def context() -> Context:
    return open_context(Zoo.load("digits", check=lambda _: None), Data.load("digits", probe=128))


def assembly(context: Context, *spans: tuple[str, int, int | None]) -> Assembly:
    ends = [(name, first, last or len(context.lowered[name].units)) for name, first, last in spans]
    return Assembly(tuple(BlockRef(*end, place) for place, end in enumerate(ends)))


@pytest.fixture(scope="module")
def fitted(context):
    """A donor without batch norms, then two parts of one with them."""
    return FitStitches().run(context, assembly(context, (FRONT, 0, 9), (TAIL, 14, 16), (TAIL, 17, None)))


def recalibrated(context, stitched):
    return Recalibrate().run(context, stitched, Consult().run(context))


def states(context) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{path}": value.clone()
        for name in context.zoo.names
        for path, value in context.lowered[name].module.state_dict().items()
    }


def test_the_statistics_are_those_that_torch_estimates_behind_the_front(context, fitted):
    before = states(context)
    found = recalibrated(context, fitted)
    assert found.buffers[0] == {} and all(found.buffers[1:]) and found.states is fitted.states
    parts = live(fitted, context.lowered).parts
    tail = nn.Sequential(*map(copy.deepcopy, parts[1:]))
    with torch.no_grad():
        loader = [parts[0](images) for images, _ in context.data.probe.batches(32)]
        update_bn(loader, tail)
    mine = live(found, context.lowered).parts[1:]
    for one, other in zip(mine, tail, strict=True):
        for (name, value), (_, wanted) in zip(one.named_buffers(), other.named_buffers(), strict=True):
            np.testing.assert_allclose(value.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    assert all(torch.equal(value, before[name]) for name, value in states(context).items())


def test_more_validation_images_are_answered_right(context):
    reference, plain = (
        Consult().run(context),
        FitStitches().run(context, assembly(context, (FRONT, 0, 9), (TAIL, 14, None))),
    )
    before, after = (Score().run(context, one, reference).value for one in (plain, recalibrated(context, plain)))
    assert after > before + 0.1


def test_statistics_that_make_it_worse_are_dropped(context, fitted):
    """Probe images of one grey, whose statistics are no images' statistics."""
    grey = Split(np.full_like(context.data.probe.images, 128), context.data.probe.labels)
    other = replace(context, data=replace(context.data, probe=grey))
    assert recalibrated(other, fitted) is fitted


def test_without_labels_the_consensus_judges(context, fitted):
    """A consensus that says what the network answers as it is lets nothing else in."""
    bare = Split(context.data.validation.images, None)
    other = replace(context, data=replace(context.data, validation=bare))
    asked = Consult().run(other)
    assert len(asked.answers) == len(bare) and any(Recalibrate().run(other, fitted, asked).buffers)
    own = replace(asked, answers=logits(live(fitted, context.lowered), bare).argmax(1).numpy())
    assert Recalibrate().run(other, fitted, own) is fitted


def test_nothing_is_estimated_before_the_first_stitch_or_where_there_are_no_norms(context):
    plain = FitStitches().run(context, assembly(context, (TAIL, 0, 14), (FRONT, 9, None)))
    assert recalibrated(context, plain) is plain


def dimmed(context: Context) -> Context:
    """The same images with a quarter of their light."""
    data = context.data
    splits = {name: getattr(data, name) for name in ("probe", "validation")}
    dark = {name: Split(split.images // 4, split.labels) for name, split in splits.items()}
    return replace(context, data=replace(data, **dark))


def searched(context: Context) -> Judged:
    """What a search makes of a zoo that has one donor."""
    zoo = Zoo("one", (context.zoo[TAIL],))
    alone = replace(context, zoo=zoo, lowered=LiveDonors(zoo, NEGLIGIBLE))
    found = analyse(alone, resolve({}, {}, None), Timings())
    blocks = {str(block): latency(1.0) for block in found.partition.blocks[TAIL]}
    stitches = {e.stitch: latency(3.0) for e in layered.build(found.cuts, found.partition).edges if e.stitch}
    table = LatencyTable("cpu", {}, {TAIL: latency(4.0)}, blocks, stitches, 0.01)
    select = Select(latency_ms=5.0, heads=(TAIL,))
    search = Search(alone, select, found.cuts, found.embedded, found.partition, table, 2, Timings())
    search.run()
    (judged,) = (one for one in search.judged.values() if one.assembly.intact)
    return judged


def test_a_donor_that_sees_other_images_gets_their_statistics_where_that_is_significantly_better(context):
    usual, darker = searched(context), searched(dimmed(context))
    assert not usual.stitched.buffers
    assert darker.assembly == usual.assembly and all(darker.stitched.buffers)
    data = dimmed(context).data
    network = context.lowered[TAIL].program
    as_it_came = float((logits(network, data.validation).argmax(1).numpy() == data.validation.labels).mean())
    assert darker.scores.accuracy > as_it_came + 0.05


def test_without_labels_a_donor_stays_as_it_came(context):
    dark = dimmed(context)
    bare = Split(dark.data.validation.images, None)
    assert not searched(replace(dark, data=replace(dark.data, validation=bare))).stitched.buffers


def test_nothing_is_estimated_from_few_images(context, fitted):
    few = replace(context, data=replace(context.data, probe=context.data.probe.first(63)))
    assert recalibrated(few, fitted) is fitted


def test_stitches_are_fitted_to_what_blocks_give_with_norms_of_their_own(context, fitted):
    """In order: a stitch, the norms behind it, the next stitch."""
    whole, plain = fitted.assembly, FitStitches()
    found = replace(plain, norms=True).run(context, whole)
    first = Recalibrate().run(context, replace(fitted, assembly=whole), Consult().run(context))
    assert found.buffers[0] == {} and all(found.buffers[1:])
    for name, value in fitted.states[0].items():
        np.testing.assert_array_equal(found.states[0][name], value, err_msg=name)
    for name, value in first.buffers[1].items():
        np.testing.assert_allclose(found.buffers[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    network = live(found, context.lowered)
    stitch = stitching.build(*(context.lowered[TAIL].cuts[cut].type for cut in (16, 17)))
    plain.fit(stitch, nn.Sequential(*network.parts[:3]), context.lowered[TAIL].block(0, 17), context.data.probe)
    for name, value in stitch.state_dict().items():
        np.testing.assert_allclose(found.states[1][name], value.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)
    few = replace(context, data=replace(context.data, probe=context.data.probe.first(63)))
    assert not replace(plain, norms=True).run(few, whole).buffers
