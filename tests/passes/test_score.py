"""Scores: NASWOT against its definition, and candidates judged as they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from derc.artifacts import Assembly, BlockRef, StitchedAssembly
from derc.data import Data, Split
from derc.judge import answers
from derc.passes.score import Consult, Score
from derc.scoring.codes import log_determinant, naswot
from tests.world import make_context


def test_log_determinant_is_that_of_the_hamming_kernel():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, (6, 50)).astype(bool)
    kernel = np.array([[50 - (a ^ b).sum() for b in codes] for a in codes], float)
    parts = [torch.from_numpy(codes[:, :20]), torch.from_numpy(codes[:, 20:])]
    assert log_determinant(parts) == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ReLU6()])
def test_naswot_sees_every_common_activation(activation):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Flatten(), nn.LazyLinear(4))
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    network(torch.zeros(1, 3, 8, 8))
    assert naswot(network, Split(images, None), 32, 16) > 0


def intact(context, name):
    return StitchedAssembly(Assembly((BlockRef(name, 0, len(context.lowered[name].units), 0),)), (), ())


def test_labelled_score_is_accuracy_on_validation(tmp_path):
    context = make_context(tmp_path, "resnet", "convnext")
    images, labels = next(iter(context.data.validation.batches(10000)))
    for name in ("resnet", "convnext"):
        one = Score().run(context, intact(context, name), Consult().run(context))
        with torch.no_grad():
            outputs = context.lowered[name].program.eval()(images)
        assert one.labelled
        assert one.value == pytest.approx((answers(outputs, None) == labels.numpy()).mean())


def test_without_labels_the_score_is_agreement_with_the_donors(tmp_path):
    context = make_context(tmp_path, "resnet")
    data = context.data
    bare = Data("bare", None, *(Split(s.images, None) for s in (data.probe, data.validation, data.heldout)))
    context = type(context)(**{**vars(context), "data": bare})
    one = Score().run(context, intact(context, "resnet"), Consult().run(context))
    assert not one.labelled
    assert one.value == 1.0
