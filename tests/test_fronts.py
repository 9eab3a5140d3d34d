"""What is kept behind networks' fronts changes nothing but the time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from derc import fronts
from derc.artifacts import Assembly, BlockRef
from derc.data import Split
from derc.fronts import Fronts, Step
from derc.passes.stitch import FitStitches
from tests.world import make_context


class Counting(nn.Module):
    """Doubles in place, as many a network's activation edits in place, and counts the images."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        return x.mul_(2)


def images(count: int = 10) -> Split:
    random = np.random.default_rng(0)
    return Split(random.integers(0, 255, (count, 4, 4, 3)).astype(np.uint8), None)


def test_a_common_front_runs_once_and_edits_in_place_do_not_reach_what_is_kept():
    first, second, third = Counting(), Counting(), Counting()
    kept, split = Fronts(), images()
    a, b, c = Step("a", first), Step("b", second), Step("c", third)
    plain = torch.cat([x for x, _ in split.batches(4)])
    for steps, doublings in (((a, b), 2), ((a, c), 2), ((a, b, c), 3), ((a,), 1)):
        assert torch.equal(torch.cat(list(kept.run(split, 4, steps))), plain * 2**doublings)
    assert (first.images, second.images, third.images) == (10, 10, 20)


def test_other_images_and_other_batches_are_not_taken_for_the_same():
    step, kept, split = Step("a", Counting()), Fronts(), images()
    other = Split(255 - split.images, None)
    assert not torch.equal(*(torch.cat(list(kept.run(one, 4, [step]))) for one in (split, other)))
    assert [len(x) for x in kept.run(split, 3, [step])] == [3, 3, 3, 1]


@pytest.mark.parametrize("limit", [0, 1000, 2500])
def test_the_limit_holds_and_the_least_used_go(limit):
    step, kept, split = Counting(), Fronts(limit), images()
    one = [torch.cat(list(kept.run(split, 4, [Step("a", step)]))) for _ in range(2)]
    assert torch.equal(*one)
    assert kept.taken <= limit
    assert step.images == {0: 20, 1000: 20, 2500: 10}[limit]


def test_stitches_fitted_behind_kept_fronts_are_the_same_bit_for_bit(tmp_path):
    warm, cold = (make_context(tmp_path / name, "resnet", "vit", "convnext") for name in ("warm", "cold"))
    thirds = {name: len(warm.lowered[name].units) // 3 for name in warm.lowered}
    ends = {name: len(warm.lowered[name].units) for name in warm.lowered}

    def chain(*names: str) -> Assembly:
        a, b, c = names
        return Assembly(
            (
                BlockRef(a, 0, thirds[a], 0),
                BlockRef(b, thirds[b], 2 * thirds[b], 1),
                BlockRef(c, 2 * thirds[c], ends[c], 2),
            )
        )

    for names in (("resnet", "vit", "convnext"), ("resnet", "vit", "resnet"), ("resnet", "resnet", "vit")):
        object.__setattr__(cold, "fronts", Fronts(0))
        one, two = (FitStitches().run(context, chain(*names)) for context in (warm, cold))
        assert one.residual == two.residual
        for mine, other in zip(one.states, two.states, strict=True):
            assert mine.keys() == other.keys()
            assert all(np.array_equal(mine[key], other[key]) for key in mine)
    assert warm.fronts.taken > 0 == cold.fronts.taken


def test_stitches_with_other_weights_are_other_steps():
    stitches = [nn.Linear(3, 3) for _ in range(2)]
    assert fronts.added(stitches[0]).key != fronts.added(stitches[1]).key
    assert fronts.added(stitches[0]).key == fronts.added(stitches[0]).key
