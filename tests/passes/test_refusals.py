"""What cannot be lowered or cut is named with its module and line; what can is never cut wrongly."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch
from torch import nn

import derc
from derc.errors import UsageError
from derc.passes.cut import find_cuts
from derc.passes.lower import lower


class Stem(nn.Module):
    """Something to cut before what each test is about."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def features(self, x):
        return self.two(torch.relu(self.one(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # line of the branch


class Sizes(nn.Module):
    def forward(self, x):
        return x * int(x.sum())  # line of the size


def with_part(part: nn.Module) -> nn.Module:
    network = Stem()
    network.head = nn.Sequential(part, network.head)
    return network.eval()


class TwoInputs(Stem):
    def forward(self, x, mask):
        return self.head((self.features(x) * mask).mean((2, 3)))


class TwoOutputs(Stem):
    def forward(self, x):
        x = self.features(x)
        return self.head(x.mean((2, 3))), x


class Dictionary(Stem):
    def forward(self, x):
        return {"logits": super().forward(x)}


class TwoColumns(nn.Module):
    """Two networks side by side, joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Stem(), Stem()

    def forward(self, x):
        return self.left(x) + self.right(x)


class Whole(nn.Module):
    """One part after another, but what passes between them is whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(256, 5)

    def forward(self, x):
        return self.table(x.long().flatten(1))


class Spectrum(Stem):
    """A complex value in the middle."""

    def forward(self, x):
        x = torch.fft.rfft2(self.features(x))
        return self.head((x.real + x.imag).mean((2, 3)))


def line_of(kind: type, text: str) -> str:
    lines, start = inspect.getsourcelines(kind)
    return f"{inspect.getsourcefile(kind)}:{start + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            with_part(Branches()),
            ["depends on the data", "Branches at head.0", line_of(Branches, "line of the branch")],
        ),
        (with_part(Sizes()), ["data", "Sizes at head.0", line_of(Sizes, "line of the size")]),
        (TwoInputs(), ["several inputs (x, mask", line_of(TwoInputs, "def forward")]),
        (TwoOutputs(), ["does not return one tensor", "tuple", line_of(TwoOutputs, "def forward")]),
        (Dictionary(), ["does not return one tensor", "dict", "logits"]),
        (TwoColumns(), ["no cut", "left.one", "right.one", line_of(Stem, "self.two(")]),
    ],
    ids=["branch", "size", "inputs", "outputs", "dictionary", "columns"],
)
def test_the_module_and_the_line_are_named(network, words):
    with pytest.raises(UsageError) as caught:
        derc.lower(network.eval(), (3, 8, 8), name="odd")
    message = str(caught.value)
    assert "odd" in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_normalised_images_are_no_cut():
    lowered = lower(TwoColumns().eval(), (3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(UsageError, match=r"no cut.*left\.one.*right\.one"):
        lowered.with_cuts(find_cuts(lowered.graph))


def test_values_that_are_no_floats_are_never_cuts():
    lowered = derc.lower(Spectrum().eval(), (3, 8, 8))
    kinds = {op.type.dtype for op in lowered.graph.ops}
    assert "complex64" in kinds
    assert all(cut.type.dtype == "float32" for cut in lowered.cuts)


def test_a_network_whose_only_cuts_are_whole_numbers_is_refused():
    with pytest.raises(UsageError, match=r"no cut: long .*test_refusals.py:\d+\) gives int64"):
        derc.lower(Whole().eval(), (3, 8, 8))


class Twice(Stem):
    """The second convolution is applied at both ends."""

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        x = torch.relu(self.middle(x))
        return self.head(torch.relu(self.two(x)).mean((2, 3)))

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 3, padding=1)


def test_no_cut_parts_uses_of_one_weight():
    network = Twice().eval()
    lowered = derc.lower(network, (3, 8, 8))
    names = {tie.weight for tie in lowered.graph.ties}
    assert names == {"two.weight", "two.bias"}
    for index in range(len(lowered.units)):
        block = lowered.block(index, index + 1)
        held = sum(any(p is network.two.weight for p in part.parameters()) for part in [block])
        uses = [node for node in block.graph.nodes if node.target == "two"]
        assert held == bool(uses)
        assert len(uses) in (0, 2)


def test_weights_tied_from_end_to_end_leave_no_cut():
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)).eval()
    network[2].weight = network[0].weight
    with pytest.raises(UsageError, match=r"no cut: its weight 0\.weight is used from"):
        derc.lower(network, (3, 8, 8))


def test_hooks_are_refused_and_named():
    network = Stem().eval()

    def double(module, args, output):
        return output * 2

    network.two.register_forward_hook(double)
    with pytest.raises(UsageError, match=re.escape("module two has the hook") + ".*double.*test_refusals.py"):
        derc.lower(network, (3, 8, 8))


def test_weight_norm_is_no_reason_to_refuse():
    network = Stem()
    network.two = nn.utils.parametrizations.weight_norm(network.two)
    assert len(derc.lower(network.eval(), (3, 8, 8)).cuts) > 2


class Edits(Stem):
    """Adds in place, drops the result, and goes on with the operand."""

    def forward(self, x):
        x = self.one(x)
        x.add_(1.0)
        kept = x
        x.relu_()
        return self.head((self.two(x) + kept).mean((2, 3)))


class EditsParts(Stem):
    def forward(self, x):
        x = self.features(x)
        x[:, 0].mul_(2.0)  # line of the edit
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("negligible", [0.0, 0.005])
def test_edits_in_place_are_kept(negligible):
    network = Edits().eval()
    reference = copy.deepcopy(network)
    lowered = lower(network, (3, 8, 8))
    lowered = lowered.with_cuts(find_cuts(lowered.graph, negligible))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = x
    with torch.no_grad():
        for index in range(len(lowered.units)):
            got = lowered.block(index, index + 1)(got.clone())
        assert torch.equal(got, reference(x))


def test_an_edit_of_a_part_is_refused_or_exact():
    network = EditsParts().eval()
    try:
        lowered = derc.lower(network, (3, 8, 8))
    except UsageError as error:
        assert line_of(EditsParts, "line of the edit") in str(error)
        return
    x = torch.rand(2, 3, 8, 8)
    got = x
    with torch.no_grad():
        for index in range(len(lowered.units)):
            got = lowered.block(index, index + 1)(got.clone())
        assert torch.equal(got, network(x))


class DropsOut(Stem):
    """Functional dropout and a branch on the mode, both of the network itself."""

    def forward(self, x):
        x = nn.functional.dropout(self.features(x), 0.5, training=self.training)
        return self.head(x.mean((2, 3)))


def test_functional_dropout_follows_the_mode():
    network, reference = DropsOut(), DropsOut()
    reference.load_state_dict(network.state_dict())
    lowered = derc.lower(network.train(), (3, 8, 8))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for train in (True, False):
        network.train(train)
        reference.train(train)
        blocks = nn.Sequential(*(lowered.block(i, i + 1) for i in range(len(lowered.units)))).train(train)
        torch.manual_seed(1)
        got = blocks(x)
        torch.manual_seed(1)
        assert torch.equal(got, reference(x))


def test_frozen_parts_stay_frozen():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    network.train()
    network[1].eval()
    lowered = derc.lower(network, (3, 8, 8))
    lowered.block(0, len(lowered.units))
    assert network.training and network[3].training
    assert not network[1].training


class Table(Stem):
    """Two blocks add one table, which is made from a parameter, with or without dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.drop = nn.Dropout(p)
        self.three, self.four = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        table = self.drop(torch.sigmoid(self.table))
        x = torch.relu(self.three(self.features(x)) + table)
        x = torch.relu(self.four(x) + table)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_table_ties_its_users_only_where_it_is_random(p):
    network, reference = Table(p), Table(p)
    reference.load_state_dict(network.state_dict())
    lowered = lower(network.train(), (3, 8, 8))
    lowered = lowered.with_cuts(find_cuts(lowered.graph, 0.0))
    assert [tie.weight for tie in lowered.graph.ties] == (["drop"] if p else [])
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    blocks = nn.Sequential(*(lowered.block(i, i + 1) for i in range(len(lowered.units)))).train()
    torch.manual_seed(1)
    got = blocks(x)
    torch.manual_seed(1)
    assert torch.equal(got, reference.train()(x))
