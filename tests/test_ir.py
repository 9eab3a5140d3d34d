"""The scale of a value: image pixels from one position to the next."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc.ir import Layout, TensorType, scaled
from derc.passes.lower import lower
from tests.networks import make

sizes = st.integers(1, 4096)


@settings(deadline=None, derandomize=True)
@given(first=st.tuples(sizes, sizes), second=st.tuples(sizes, sizes))
def test_strides_are_equal_where_their_ratios_are(first: tuple[int, int], second: tuple[int, int]) -> None:
    strides = [scaled(TensorType((1, rows, rows), Layout.NCHW), (size, size)).stride for size, rows in (first, second)]
    assert (strides[0] == strides[1]) == (Fraction(*first) == Fraction(*second))


def test_only_known_positions_have_a_stride() -> None:
    assert scaled(TensorType((4, 8, 3), Layout.NHWC), (32, 32)).stride == (8.0, 4.0)
    for kind in (TensorType((8,), Layout.NC), TensorType((9, 4), Layout.NLC), TensorType((4, 4, 4), Layout.OTHER)):
        assert scaled(kind, (32, 32)) == kind


@pytest.mark.parametrize("family", ["resnet", "registers", "swin"])
def test_every_value_of_a_donor_carries_its_stride(family: str) -> None:
    types = lower(make(family), (3, 32, 32)).graph.types.values()
    placed = [kind for kind in types if kind.spatial]
    assert len({kind.stride for kind in placed}) > 1
    for kind in types:
        assert (kind.stride is None) == (kind.spatial is None)
    for kind in placed:
        assert kind.stride == (32 / kind.spatial[0], 32 / kind.spatial[1])
