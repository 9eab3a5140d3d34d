"""Blocks that donors teach one by one: held against plain torch, resumed, and what is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from derc import blockwise
from derc.artifacts import BlockRef
from derc.blockwise import Course
from derc.errors import UsageError
from derc.training import TrainOptions, train
from derc.training import blockwise as teaching
from derc.training.blockwise import InputOf, Lesson, teach
from derc.training.checkpoint import Work
from derc.training.examples import as_examples
from derc.training.freeze import Freeze, everything
from derc.training.lessons import Place, chosen
from tests.training.small import same, split

SHORT = TrainOptions(epochs=3, batch=50, lr=3e-3)
pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(width: int, seed: int) -> nn.Sequential:
    """Three parts: a stem, a body with batch norm and an edit in place, and a head; it knows nothing."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    head = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(16 * width, 10)))
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.ReLU()), body, head).eval()


def learnt(width: int, seed: int) -> nn.Sequential:
    """Such a donor after eight epochs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(donor := fresh(width, seed), split("train"), split("validation"), replace(SHORT, epochs=8))
    torch.set_num_threads(threads)
    return donor


FRONT, TAIL = learnt(8, 1), learnt(12, 2)


def assembled(seed: int = 0) -> nn.Sequential:
    """FRONT's stem, a stitch, and TAIL's body and head."""
    torch.manual_seed(seed)
    parts = OrderedDict(block0=FRONT[0], stitch1=nn.Conv2d(8, 12, 1), block1=TAIL[1:])
    return copy.deepcopy(nn.Sequential(parts))


def lesson(**changes: object) -> Lesson:
    one = Lesson("block1", ("stitch1", "block1"), FRONT[0], TAIL, ("front", "tail"))
    return replace(one, **changes)


def missed(network: nn.Module, name: str = "validation") -> float:
    """What block1 misses of TAIL's answers for FRONT's own values, by hooks on the donors."""
    images = torch.cat([x for x, _ in split(name).batches(64)])
    seen = {}
    handle = FRONT[0].register_forward_hook(lambda _m, _x, y: seen.update(front=y))
    with torch.no_grad():
        FRONT(images)
        wanted = TAIL(images).double()
        got = network.block1(network.stitch1(seen["front"])).double()
    handle.remove()
    return float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_what_is_missed_is_what_plain_torch_finds_and_becomes_less():
    one = assembled()
    before = missed(one)
    found = teach(one, lesson(), split("train"), split("validation"), SHORT)
    assert found.before.loss == pytest.approx(before, rel=1e-5)
    assert found.after.loss == pytest.approx(missed(one), rel=1e-5)
    assert found.after.loss < 0.5 * before and found.kept == "weights" and found.images == 3 * 300


def test_donors_and_the_rest_of_the_network_stay_as_they_are():
    one = assembled()
    before = [copy.deepcopy(part.state_dict()) for part in (FRONT, TAIL, one.block0)]
    teach(one, lesson(), split("train"), split("validation"), SHORT)
    after = [part.state_dict() for part in (FRONT, TAIL, one.block0)]
    assert all(same(*pair) for pair in zip(before, after, strict=True))


def test_frozen_blocks_stay_while_the_stitch_learns():
    one = assembled()
    before = copy.deepcopy(one.state_dict())
    found = teach(one, lesson(), split("train"), split("validation"), SHORT, trains=Freeze("blocks"))
    after = one.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"stitch1.weight", "stitch1.bias"} and found.after.loss < found.before.loss


def test_a_block_that_gets_its_own_donors_input_misses_nothing_and_stays():
    one = nn.Sequential(OrderedDict(block0=copy.deepcopy(TAIL[0]), block1=copy.deepcopy(TAIL[1:])))
    before = copy.deepcopy(one.state_dict())
    own = Lesson("block1", ("block1",), TAIL[0], TAIL, ("tail", "tail"))
    found = teach(one, own, split("train"), split("validation"), SHORT)
    assert found.before.loss < 1e-10 and found.kept == "before" and same(before, one.state_dict())


def test_labels_do_not_matter():
    first, second = assembled(), assembled()
    teach(first, lesson(), split("train"), split("validation"), SHORT)
    others = [replace(split(name), labels=split(name).labels * 0) for name in ("train", "validation")]
    teach(second, lesson(), *others, replace(SHORT, mixup=0.3, smoothing=0.1))
    assert same(first.state_dict(), second.state_dict())


def test_values_that_do_not_fit_are_computed_again_and_give_the_same(monkeypatch):
    kept, computed = assembled(), assembled()
    teach(kept, lesson(), split("train"), split("validation"), SHORT)
    monkeypatch.setattr(teaching, "LIMIT", 0)
    teach(computed, lesson(), split("train"), split("validation"), SHORT)
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, computed.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_augmented_images_are_shown_to_the_donors_too():
    one = assembled()
    found = teach(one, lesson(), split("train"), split("validation"), replace(SHORT, augment="crop=2"))
    assert found.after.loss < 0.6 * found.before.loss


class StopError(Exception):
    pass


def test_an_interrupted_lesson_ends_with_the_same_weights_and_is_not_repeated(tmp_path):
    whole, one, steps = assembled(), assembled(), []
    teach(whole, lesson(), split("train"), split("validation"), SHORT)

    def stop(*_: object) -> None:
        if one.stitch1.training:
            steps.append(1)
        if len(steps) == 9:
            raise StopError

    handle = one.stitch1.register_forward_hook(stop)
    work, said = Work(tmp_path / "work", {}), []
    work.open()
    with pytest.raises(StopError):
        teach(one, lesson(), split("train"), split("validation"), SHORT, work=work)
    handle.remove()
    for number in range(2):
        again = assembled(seed=number + 5)
        found = teach(again, lesson(), split("train"), split("validation"), SHORT, work=work, say=said.append)
        parts = [(again.stitch1, whole.stitch1), (again.block1, whole.block1)]
        assert all(same(one.state_dict(), other.state_dict()) for one, other in parts)
    assert said == ["going on from step 6 of 18", "going on from step 18 of 18"] and found.steps == 18


def test_features_before_a_fitted_head_are_compared_in_place_of_answers():
    one = assembled()
    one.block1[1].fc = nn.Linear(192, 3)
    head = copy.deepcopy(one.block1[1].fc.state_dict())
    tapped = lesson(wanted=InputOf(TAIL, TAIL[2].fc), tap="block1.2.fc")
    found = teach(one, tapped, split("train"), split("validation"), replace(SHORT, decay=0.0))
    images = torch.cat([x for x, _ in split("validation").batches(64)])
    with torch.no_grad():
        wanted = TAIL[1](TAIL[0](images)).flatten(1).double()
        got = one.block1[0](one.stitch1(FRONT[0](images))).flatten(1).double()
    share = float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert found.after.loss == pytest.approx(share, rel=1e-5) and found.after.loss < found.before.loss
    assert same(head, one.block1[1].fc.state_dict())


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::8, ::8].repeat(1, 4, 1, 1)[:, :8] / 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": Broken()}, "donor front gives values that are not finite, so block1 cannot be taught: .*--zoo"),
        (
            {"wanted": TAIL[:2]},
            r"block1 is no block of these donors \(it gives \(10,\), its donor \(12, 4, 4\)\).*--zoo",
        ),
        ({"given": TAIL[0]}, r"block1 is no block of these donors \(it does not take what front gives\).*--zoo"),
    ],
)
def test_donors_that_cannot_teach_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        teach(assembled(), lesson(**changes), split("train"), split("validation"), SHORT)


def course(network: nn.Module, folder, wanted: nn.Module = TAIL) -> Course:
    places = (Place(0, BlockRef("front", 0, 1, 0)), Place(1, BlockRef("tail", 1, 3, 1), ("stitch1",)))
    images, validation = as_examples(split("train")), as_examples(split("validation"))
    return Course(network, (lesson(wanted=wanted),), places, images, validation, SHORT, everything, folder, {})


@pytest.mark.parametrize("allow_worse", [False, True])
def test_a_network_that_gets_worse_keeps_its_weights_unless_told(tmp_path, allow_worse):
    """A block that an ignorant donor teaches learns what it is shown, and the network forgets what it knew."""
    one, said = assembled(), []
    train(one, split("train"), split("validation"), replace(SHORT, epochs=8))
    before = copy.deepcopy(one.state_dict())
    found = blockwise.learn(
        course(one, tmp_path, fresh(12, 3)), lambda *_: said.append, 1, 0, None, allow_worse, said.append
    )
    assert found.blocks["block1"].kept == "weights" and found.before.accuracy > found.after.accuracy
    assert same(before, one.state_dict()) is not allow_worse and found.kept is allow_worse
    assert ("keep the weights that they came with" in found.lines()[-1]) is not allow_worse
    record = found.record()
    assert record["blocks"][0]["loss"]["after"] < record["blocks"][0]["loss"]["before"]
    assert [row["pass"] for row in record["log"]] == [1, 2, 3] == [int(line.split()[2][0]) for line in said]


def test_which_blocks_are_taught():
    places = [
        Place(0, BlockRef("a", 0, 1, 0)),
        *(Place(n, BlockRef("b", n, n + 1, 0), (f"stitch{n}",)) for n in (1, 2)),
    ]
    assert [one.number for one in chosen(places)] == [1, 2]
    assert [one.number for one in chosen(places, "2, block0")] == [0, 2]
    with pytest.raises(UsageError, match=r"there is no block '3', this network has 0, 1, 2"):
        chosen(places, "1,3")
    with pytest.raises(UsageError, match="this network has no stitch: leave it out"):
        chosen(places[:1])
