"""What a stitch costs, which pairs of types have one, and how its shape is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from derc import stitching
from derc.errors import DercError
from derc.ir import Layout, TensorType, scaled
from tests.stitches import LAYOUTS, PAIRS, kinds

examples = settings(deadline=None, max_examples=12, derandomize=True)


@pytest.mark.parametrize(("before", "after"), PAIRS)
@examples
@given(data=st.data())
def test_the_cost_is_that_of_the_module(before: str, after: str, data: st.DataObject) -> None:
    source, target = data.draw(kinds(before)), data.draw(kinds(after))
    assert stitching.convertible(source, target)
    stitch, cost = stitching.build(source, target), stitching.cost(source, target)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = stitch(torch.zeros(1, *source.shape))
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.params == sum(parameter.numel() for parameter in stitch.parameters())
    assert cost.bytes == result.numel() * result.element_size()


@pytest.mark.parametrize(("before", "after"), PAIRS)
@examples
@given(data=st.data())
def test_selection_makes_up_no_places(before: str, after: str, data: st.DataObject) -> None:
    known = {"NC": 0, "NLC of an unknown grid": 1}
    source, target = data.draw(kinds(before)), data.draw(kinds(after))
    assert stitching.keeps_places(source, target) == (known.get(before, 2) >= known.get(after, 2))


@pytest.mark.parametrize("other", [TensorType((4, 2, 2), Layout.OTHER), TensorType((4, 2, 2), Layout.NCHW, "int64")])
def test_what_is_unknown_or_no_float_has_no_stitch(other: TensorType) -> None:
    image = TensorType((4, 2, 2), Layout.NCHW)
    assert not stitching.convertible(image, other)
    assert not stitching.convertible(other, image)
    assert not stitching.keeps_places(image, other)


def test_an_unknown_layout_has_no_channels() -> None:
    with pytest.raises(DercError):
        _ = TensorType((2, 2, 2, 2), Layout.OTHER).channels


@pytest.mark.parametrize("layout", LAYOUTS)
@examples
@given(data=st.data(), image=st.tuples(st.integers(1, 999), st.integers(1, 999)))
def test_the_name_of_a_shape_knows_no_stride(layout: str, data: st.DataObject, image: tuple[int, int]) -> None:
    kind = data.draw(kinds(layout))
    assert stitching.describe(scaled(kind, image)) == stitching.describe(kind)
    assert stitching.key(scaled(kind, image), kind) == stitching.key(kind, scaled(kind, image))
    assert stitching.arguments(scaled(kind, image), kind) == stitching.arguments(kind, kind)


def test_shapes_that_run_differently_have_different_names() -> None:
    tokens = TensorType((17, 5), Layout.NLC, prefix=1, grid=(4, 4))
    others = (tokens, replace(tokens, grid=(2, 8)), replace(tokens, grid=None), replace(tokens, prefix=0, grid=None))
    assert len({stitching.describe(kind) for kind in others}) == 4
