"""Matching without labels: exact where the optimum is known, never worse, and frozen where nothing may change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from derc.amounts import Amount, amount
from derc.batchnorm import broken, norms, reestimated
from derc.data import Split
from derc.errors import DercError, UsageError
from derc.fronts import Step
from derc.matching import Learner, Lesson, agreement
from derc.matching_training import Training
from derc.modules import Stitch
from derc.passes.lower import lower
from derc.recall import Recall

SHAPE = ("NCHW", 6, 0, (4, 4)), ("NCHW", 5, 0, (4, 4))


def images(count: int, seed: int = 0) -> Split:
    return Split(np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8), None)


def conv(out: int, seed: int, given: int = 3) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(given, out, 1).requires_grad_(False)


def centred(out: int, seed: int) -> nn.Conv2d:
    """Values of about mean 0 and variance 1 from uniformly random images."""
    module = conv(out, seed)
    nn.init.orthogonal_(module.weight)
    module.weight.mul_(12**0.5)
    module.bias.copy_(-module.weight.sum((1, 2, 3)) / 2)
    return module


class Answers(nn.Module):
    """Ten answers from the mean of each map."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(5, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear((x - 0.1).mean((2, 3)) * 40)
        return found


def small(seed: int = 0) -> Stitch:
    torch.manual_seed(seed)
    return Stitch(*SHAPE)


def lesson(*, answers: bool = True) -> Lesson:
    front, donor = Step("front", centred(6, 1)), Step("donor", nn.Sequential(conv(5, 2), nn.Tanh()))
    return Lesson(Recall(), (front,), (donor,), Step("head", Answers(3)) if answers else None, answers=answers)


def training(network: Learner, task: Lesson, shown: int, seed: int = 0, **options) -> Training:
    return Training(network, task, images(256), images(100, 1), Amount(images=shown), seed, **options)


def test_a_linear_tail_comes_to_its_least_squares_optimum():
    task, split = lesson(answers=False), images(256)
    network = Learner([(None, small())], None)
    every = torch.arange(256)
    x = task.inputs(split, every).permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    y = task.goal(split, every).features.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    design = np.concatenate([x, np.ones((len(x), 1))], 1)
    left = np.linalg.lstsq(design, y, rcond=None)[1].sum()
    values = y.reshape(256, -1, 5)
    wanted = 1 - left / ((values - values.mean(0)) ** 2).sum()
    found = replace(training(network, task, 20000), validation=split).run()
    assert found.before < 0.5 < wanted
    assert wanted - 0.01 < found.after <= wanted + 1e-6


def test_answers_come_to_agree_and_only_the_stitch_is_trained():
    block = conv(5, 7, 5)
    nn.init.orthogonal_(block.weight)
    network, task = Learner([(None, small()), (1, block)], Answers(3)), lesson()
    others = [parameter.clone() for block in network.blocks for parameter in block.parameters()]
    asked = [parameter.requires_grad for block in network.blocks for parameter in block.parameters()]
    found = training(network, task, 32000).run()
    assert found.after > max(found.before, 0.9)
    assert found.after == agreement(found.network, task, images(100, 1))[0]
    kept = [parameter for block in network.blocks for parameter in block.parameters()]
    assert all(map(torch.equal, others, kept))
    assert asked == [parameter.requires_grad for parameter in kept]
    assert all(parameter.grad is None for parameter in kept)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(seed=st.integers(0, 10**6), shown=st.integers(1, 80))
def test_what_leaves_matching_never_agrees_less_than_what_went_in(seed, shown):
    network, task = Learner([(None, small(seed))], Answers(3)), lesson()
    before = agreement(network, task, images(100, 1))
    found = training(network, task, shown, seed).run()
    assert found.images == shown
    assert found.before == before[0]
    assert agreement(found.network, task, images(100, 1)) >= before


def test_the_seed_decides_and_the_order_of_asking_does_not():
    def trained(seed: int, recall: Recall) -> torch.Tensor:
        task = replace(lesson(), recall=recall)
        return training(Learner([(None, small())], Answers(3)), task, 700, seed).run().network.added[0].linear.weight

    warm = Recall()
    replace(lesson(), recall=warm).inputs(images(256), torch.arange(3, 200, 7))
    one, two, other = trained(0, Recall()), trained(0, warm), trained(1, Recall())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


class Hungry(nn.Module):
    """Memory for a few images alone, as an allocator says it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return x.tanh()


def test_for_want_of_memory_the_batch_halves_and_says_so():
    said: list[str] = []
    network = Learner([(None, small()), (1, Hungry(10))], Answers(3))
    found = training(network, lesson(), 640, say=said.append).run()
    assert found.images == 640
    assert [line.split(":")[0] for line in said] == [
        "memory does not suffice for 32 images at once",
        "memory does not suffice for 16 images at once",
    ]
    assert "8" in found.note
    with pytest.raises(torch.OutOfMemoryError):
        training(Learner([(None, small()), (1, Hungry(0))], Answers(3)), lesson(), 64).run()


class Explosive(nn.Module):
    """Gives infinity once what comes in has changed much."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.abs().max() > 1.2 * self.largest, x * float("inf"), x)

    largest = 1.0


def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_state_before():
    network, task = Learner([(None, small()), (1, Explosive())], Answers(3)), lesson()
    with torch.no_grad():
        Explosive.largest = float(network.added[0](task.inputs(images(256), torch.arange(256))).abs().max())
    said: list[str] = []
    found = training(network, task, 20000, say=said.append).run()
    assert found.images < 20000
    assert "not finite" in found.note and said == [found.note]
    assert found.after >= found.before
    assert all(torch.isfinite(parameter).all() for parameter in network.added[0].parameters())


@pytest.mark.parametrize("where", ["front", "donor"])
def test_activations_that_are_not_finite_are_refused(where):
    broken_step = Step("broken", nn.Threshold(2.0, float("nan")))
    task = replace(lesson(), **({"front": (broken_step,)} if where == "front" else {"features": (broken_step,)}))
    with pytest.raises(DercError, match="not finite"):
        training(Learner([(None, small())], Answers(3)), task, 32).run()


def test_another_teacher_answers_in_the_columns_of_the_same_classes():
    order = tuple(reversed(range(10)))

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, list(order)]

    own = lesson()
    turned = Step("turned", nn.Sequential(own.features[0].module, Answers(3), Turned()))
    other = replace(own, teacher=(turned,), columns=(tuple(range(10)), order))
    network, split = Learner([(None, small())], Answers(3)), images(50)
    network = training(network, own, 2000).run().network
    assert agreement(network, own, split)[0] == agreement(network, other, split)[0] > 0.5
    assert agreement(network, replace(other, columns=None), split)[0] < 0.5


@pytest.mark.parametrize(
    ("text", "want"),
    [("0", Amount()), ("3000", Amount(images=3000)), (" 30s ", Amount(seconds=30.0)), ("0.5 s", Amount(seconds=0.5))],
)
def test_amounts(text, want):
    assert amount(text) == want
    assert bool(want) == (want != Amount())


@pytest.mark.parametrize("text", ["10x", "-1", "-5s", "", "1.5", "s", "nan", "1e3", "3000 images"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="3000"):
        amount(text)


def test_batch_norms_are_estimated_anew_as_the_values_are():
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))
    batches = [torch.randn(16, 3, 5, 5) * 3 + 1 for _ in range(4)]
    found = reestimated([first, second], batches, [True, True])
    with torch.no_grad():
        values = [first[0](x).double() for x in batches]
    mean = torch.stack([v.mean((0, 2, 3)) for v in values]).mean(0)
    variance = torch.stack([v.transpose(0, 1).flatten(1).var(1) for v in values]).mean(0)
    np.testing.assert_allclose(found[0]["1.running_mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found[0]["1.running_var"], variance, rtol=1e-5)
    assert set(found[1]) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert torch.equal(first[1].running_mean, torch.zeros(4))
    assert reestimated([first, second], batches, [False, True])[0] == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (-1.0, "negative"), (0.0, "all zero")],
)
def test_broken_batch_norms_are_named(value, words):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    assert broken(module) is None
    norms(module)["1.0"].running_var.fill_(value)
    assert broken(module).startswith("the batch norm 1.0 has") and words in broken(module)


def test_a_donor_with_a_broken_batch_norm_is_refused_by_name():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    norms(module)["1"].running_mean.fill_(float("nan"))
    with pytest.raises(UsageError, match="donor bad cannot be lowered: the batch norm 1 has running statistics"):
        lower(module, (3, 8, 8), name="bad")


def test_fronts_that_do_not_fit_are_computed_each_time_and_the_same():
    split, steps = images(150), (Step("front", conv(6, 1)),)
    numbers = torch.randperm(150)[:40]
    one, two = Recall().outputs(split, steps, numbers), Recall(limit=10).outputs(split, steps, numbers)
    assert torch.allclose(one, two, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(one, steps[0].module(split.take(numbers)), atol=1e-6)
    recall = Recall(limit=150 * 6 * 16 * 4)
    for name in ("a", "b", "a"):
        recall.outputs(split, (Step(name, conv(6, 1)),), numbers)
    assert len(recall._kept) == 1
