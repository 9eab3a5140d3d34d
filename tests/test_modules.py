"""Stitches between every pair of layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import stitching
from derc.errors import DercError
from derc.ir import Layout, TensorType

sizes = st.integers(1, 9)


@st.composite
def kinds(draw, spatial: bool | None = None):
    layout = draw(st.sampled_from([Layout.NCHW, Layout.NHWC, Layout.NLC] + ([] if spatial else [Layout.NC])))
    channels, height, width = draw(st.integers(1, 8)), draw(sizes), draw(sizes)
    match layout:
        case Layout.NCHW:
            return TensorType((channels, height, width), layout)
        case Layout.NHWC:
            return TensorType((height, width, channels), layout)
        case Layout.NC:
            return TensorType((channels,), layout)
    prefix = draw(st.integers(0, 3))
    return TensorType((prefix + height * width, channels), layout, prefix=prefix, grid=(height, width))


@given(kinds(spatial=True), kinds())
@settings(deadline=None, max_examples=150)
def test_every_pair_of_types_stitches(source, target):
    assert stitching.convertible(source, target)
    stitch = stitching.build(source, target)
    assert stitch(torch.zeros(2, *source.shape)).shape == (2, *target.shape)
    assert stitching.cost(source, target).params == sum(p.numel() for p in stitch.parameters())


@given(kinds(spatial=True), kinds())
@settings(deadline=None, max_examples=50)
def test_a_stitch_is_affine_and_treats_images_apart(source, target):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, *source.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    stitch = stitching.build(source, target).double()
    both = stitch(torch.cat([a, b]))
    torch.testing.assert_close(both[:1], stitch(a))
    zero = stitch(torch.zeros_like(a))
    torch.testing.assert_close(stitch(a + 2 * b) - zero, (stitch(a) - zero) + 2 * (stitch(b) - zero))


def test_a_map_cannot_be_made_from_pooled_features():
    pooled, image = TensorType((8,), Layout.NC), TensorType((4, 2, 2), Layout.NCHW)
    assert not stitching.convertible(pooled, image)
    assert stitching.convertible(image, pooled)
    assert not stitching.convertible(image, TensorType((4, 2, 2), Layout.OTHER))
    with pytest.raises(DercError):
        _ = TensorType((2, 2, 2, 2), Layout.OTHER).channels
