"""Types say where on the image the elements of a value come from; coordinates that travel along tell the truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from derc.ir import Layout, TensorType
from derc.passes.lower import lower

C, H, W = 4, 6, 8


class Rearranges(nn.Module):
    """Permutes, merges and splits axes as it is told."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x):
        for kind, first, second in self.steps:
            rank = x.dim() - 1
            axis = 1 + first % rank
            other = 1 + second % rank
            if kind == "swap":
                x = x.transpose(axis, other)
            elif kind == "merge" and rank > 1:
                axis = min(axis, rank - 1)
                x = x.flatten(axis, axis + 1)
            elif kind == "split":
                size = x.shape[axis]
                parts = [d for d in range(1, size + 1) if size % d == 0]
                outer = parts[second % len(parts)]
                x = x.reshape(*x.shape[:axis], outer, size // outer, *x.shape[axis + 1 :])
            else:
                x = x + 0
        return x * 1


class Values(fx.Interpreter):
    """Keeps what every node gives."""

    def run_node(self, n):
        self.seen = {**getattr(self, "seen", {}), n.name: super().run_node(n)}
        return self.seen[n.name]


steps = st.lists(
    st.tuples(st.sampled_from(["swap", "merge", "split", "map"]), st.integers(0, 9), st.integers(0, 9)), max_size=7
)


def coordinates() -> torch.Tensor:
    """(1, C, H, W): each element is its own place, c · 10000 + h · 100 + w."""
    c, h, w = torch.meshgrid(torch.arange(C), torch.arange(H), torch.arange(W), indexing="ij")
    return (c * 10000 + h * 100 + w)[None].float()


def by_position(value: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """(positions, channels) by what the type says."""
    if kind.layout is Layout.NCHW:
        return value.flatten(1).T
    if kind.layout is Layout.NHWC:
        return value.flatten(0, 1)
    return value[kind.prefix :]


def assert_true(value: torch.Tensor, kind: TensorType) -> bool:
    """Every position of the grid holds only what lies in its cell of the image; False where no grid is claimed."""
    if kind.spatial is None:
        return False
    rows, columns = kind.spatial
    positions = by_position(value, kind).long()
    assert len(positions) == rows * columns
    number = torch.arange(rows * columns)[:, None]
    assert (positions // 100 % 100 * rows // H == number // columns).all(), kind
    assert (positions % 100 * columns // W == number % columns).all(), kind
    return True


@given(steps)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_a_claimed_grid_is_where_the_elements_come_from(sequence):
    lowered = lower(Rearranges(sequence).eval(), (C, H, W))
    values = Values(lowered.program)
    values.run(coordinates())
    for name, kind in lowered.graph.types.items():
        value = values.seen[name]
        if isinstance(value, torch.Tensor) and value.shape[0] == 1 and kind.layout is not Layout.OTHER:
            assert_true(value[0], kind)


KNOWN = {
    "map": ([("map", 0, 0)], Layout.NCHW, (H, W)),
    "channels last": ([("swap", 0, 1), ("swap", 1, 2)], Layout.NHWC, (H, W)),
    "tokens": ([("merge", 1, 0), ("swap", 0, 1)], Layout.NLC, (H, W)),
    "tokens and back": ([("merge", 1, 0), ("swap", 0, 1), ("swap", 0, 1), ("split", 1, 4)], Layout.NCHW, (H, W)),
    "patch merging": (
        # C H W, then H W C, then rows and columns in pairs whose inner parts go to the channels
        [
            ("swap", 0, 1),
            ("swap", 1, 2),
            ("split", 0, 2),
            ("split", 2, 2),
            ("swap", 1, 2),
            ("merge", 3, 0),
            ("merge", 2, 0),
        ],
        Layout.NHWC,
        (3, 4),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_must_be_known_is_known(case):
    sequence, layout, grid = KNOWN[case]
    lowered = lower(Rearranges(sequence).eval(), (C, H, W))
    kind = lowered.graph.types[lowered.graph.output]
    assert (kind.layout, kind.spatial) == (layout, grid)
    assert kind.stride == (H / grid[0], W / grid[1])


class Scatters(nn.Module):
    """Reorders tokens without weights, in a module of its own."""

    def forward(self, x):
        return x.flip(1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 2, 2)
        self.register = nn.Parameter(torch.zeros(1, 2, 5))
        self.middle = nn.Linear(5, 5)
        self.scatter = Scatters()
        self.last = nn.Linear(5, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.register.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.middle(x)
        x = self.scatter(x[:, 2:])
        return x + self.last(x)


def test_prefix_tokens_are_counted_and_scattered_ones_are_on_no_grid():
    types = lower(Tokens().eval(), (3, 8, 10)).graph.types
    assert (types["cat"].prefix, types["cat"].grid) == (2, (4, 5))
    assert (types["add"].prefix, types["add"].grid) == (2, (4, 5))
    assert types["scatter"].layout is Layout.NLC and types["scatter"].grid is None
    assert types["add_1"].layout is Layout.NLC and types["add_1"].grid is None and types["add_1"].stride is None
