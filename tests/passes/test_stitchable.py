"""What stitches will lose, against least squares in float64, the stitches themselves, and networks that have them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.contexts import open_context
from derc.artifacts import Assembly, CutId, StitchLosses, decode, encode
from derc.assembled import live
from derc.data import Data
from derc.ir import Layout, TensorType
from derc.judge import logits
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed
from derc.passes.lower import Lower
from derc.passes.partition import PartitionZoo
from derc.passes.stitch import FitStitches
from derc.passes.stitchable import Stitchable, stitched_pairs
from derc.stitchability import Place, Sample, blurred, maps, places, unexplained
from derc.zoo import Zoo
from tests.world import make_context

FAMILIES = ("resnet", "vit", "convnext")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    context = make_context(tmp_path_factory.mktemp("store"), *FAMILIES, probe=120)
    cuts = CutDonors().run(context, Lower().run(context))
    partition = PartitionZoo(blocks=3).run(context, cuts, Embed().run(context, cuts))
    return context, cuts, partition, Stitchable().run(context, cuts, partition)


def sample(values: torch.Tensor, place: Place) -> Sample:
    found = Sample(place, len(values))
    for part in values.split(7):
        found.add(part)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_it_is_the_share_that_least_squares_leave_on_other_images(noise):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, 6, generator=random)
    y = x @ torch.randn(6, 5, generator=random) + 3 + noise * torch.randn(64, 16, 5, generator=random)
    place = Place((4, 4), (4, 4))
    (found,) = unexplained(sample(x, place), [sample(y, place)])
    held = torch.arange(64) % 4 == 3
    design = torch.cat([x, torch.ones(64, 16, 1)], 2).double().numpy()
    solution = np.linalg.lstsq(design[~held].reshape(-1, 7), y[~held].double().numpy().reshape(-1, 5), rcond=None)[0]
    left = design[held].reshape(-1, 7) @ solution - y[held].numpy().reshape(-1, 5)
    spread = y.double().numpy().reshape(-1, 5)
    assert found == pytest.approx((left**2).sum(1).mean() / spread.var(0).sum(), abs=0.01)


def test_what_a_coarser_source_cannot_know_is_unexplained():
    """Half of the target's variance is within the cells of the source's grid."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.randn(200, 4, 3, generator=random)
    fine = coarse.reshape(200, 2, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(200, 16, 3)
    inside = torch.randn(200, 16, 3, generator=random)
    cells = inside.reshape(200, 2, 2, 2, 2, 3).mean((2, 4), keepdim=True).expand(200, 2, 2, 2, 2, 3).reshape(200, 16, 3)
    y = fine + (inside - cells) / (inside - cells).std()
    one, other = places(TensorType((3, 2, 2), Layout.NCHW), TensorType((3, 4, 4), Layout.NCHW))
    assert (one, other) == (Place((2, 2), (2, 2)), Place((4, 4), (2, 2)))
    (found,) = unexplained(sample(coarse, one), [sample(y, other)])
    assert found == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", [TensorType((4, 3, 3), Layout.NCHW), TensorType((10, 4), Layout.NLC, prefix=1)])
def test_blurring_gives_the_moments_of_a_regression(kind):
    value = torch.randn(4000, *kind.shape, generator=torch.Generator().manual_seed(0)) * 2 + 5
    rows = maps(value, replace(kind, prefix=0)).flatten()
    for share in (0.0, 0.3, 0.7, 1.0):
        found = blurred(value, kind, share, torch.Generator().manual_seed(1))
        assert found.shape == value.shape and found.is_contiguous()
        other = maps(found, replace(kind, prefix=0)).flatten()
        assert float(other.mean()) == pytest.approx(5, abs=0.05)
        assert float(other.var() / rows.var()) == pytest.approx(1 - share, abs=0.02)
        together = float(((rows - rows.mean()) * (other - other.mean())).mean() / rows.var())
        assert together == pytest.approx(1 - share, abs=0.02)
        assert float(((rows - other) ** 2).mean() / rows.var()) == pytest.approx(share, abs=0.02)


def test_every_pair_that_may_be_stitched_is_looked_at_and_no_other(world):
    _, cuts, partition, found = world
    pairs = {(StitchLosses.name(a), StitchLosses.name(b)) for a, b in stitched_pairs(cuts, partition)}
    assert pairs == {(a, b) for a, targets in found.unexplained.items() for b in targets}
    for given, taken in stitched_pairs(cuts, partition):
        assert 0 <= (found.loss(given, taken) or 0.0) <= 1
    assert found.loss(CutId("resnet", 0), CutId("vit", 0)) is None


def test_shares_are_those_of_the_stitches_themselves(world):
    """The stitch pass fits every position of every image; this looks at a sample and at three penalties."""
    context, cuts, partition, found = world
    mine, theirs = [], []
    for front in FAMILIES:
        for tail in set(FAMILIES) - {front}:
            blocks = (partition.blocks[front][0], *partition.blocks[tail][1:])
            theirs.append(min(1.0, FitStitches().run(context, Assembly(blocks)).residual[0]))
            mine.append(found.unexplained[f"{front}:{blocks[0].last}"][f"{tail}:{blocks[1].first}"])
    assert np.abs(np.array(mine) - theirs).max() < 0.1
    assert spearmanr(mine, theirs).statistic > 0.9
    assert cuts.donors.keys() == set(FAMILIES)


def test_it_foretells_how_many_answers_a_stitch_changes():
    """On trained networks; the similarity of the cuts does worse."""
    zoo, data = Zoo.load("digits"), Data.load("digits", probe=120)
    trained = ("convnext", "resnet-slim", "vit-patch8")
    context = open_context(replace(zoo, donors=tuple(one for one in zoo.donors if one.name in trained)), data)
    cuts = CutDonors().run(context, Lower().run(context))
    partition = PartitionZoo(blocks=3).run(context, cuts, Embed().run(context, cuts))
    found, expected, changed = Stitchable().run(context, cuts, partition), [], []
    for front in trained:
        for tail in set(trained) - {front}:
            for place in (1, 2):
                blocks = (*partition.blocks[front][:place], *partition.blocks[tail][place:])
                stitched = FitStitches().run(context, Assembly(blocks))
                own = logits(context.lowered[tail].program, context.data.validation).argmax(1)
                answers = logits(live(stitched, context.lowered), context.data.validation).argmax(1)
                changed.append(float((answers != own).double().mean()))
                given, taken = CutId(front, blocks[place - 1].last), CutId(tail, blocks[place].first)
                expected.append(found.loss(given, taken))
    assert spearmanr(expected, changed).statistic > 0.6, (expected, changed)


def test_it_repeats_and_survives_the_store(world):
    context, cuts, partition, found = world
    again = Stitchable().run(replace(context, seed=7), cuts, partition)
    assert again == found
    assert decode(StitchLosses, *encode(found)) == found


def test_too_many_pairs_are_left_to_the_similarities(world):
    context, cuts, partition, _ = world
    found = Stitchable(pairs=1).run(context, cuts, partition)
    embedded = replace(Embed().run(context, cuts), stitches=found)
    one, other = embedded.position[CutId("resnet", 2)], embedded.position[CutId("vit", 2)]
    assert embedded.unlike(one, other) == 1 - embedded.alike(one, other)
