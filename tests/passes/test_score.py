"""Scores: NASWOT against its definition, and candidates judged as they should be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from derc.artifacts import Assembly, BlockRef, Scores, StitchedAssembly
from derc.config import resolve
from derc.data import Data, Split
from derc.errors import UsageError
from derc.judge import answers
from derc.passes.score import Consult, Score
from derc.registry import PROXIES
from derc.scoring.codes import log_determinant, naswot
from derc.workspace import check_objective
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


@pytest.mark.parametrize("objective", PROXIES)
def test_the_objective_ranks_and_accuracy_is_still_known(tmp_path, objective):
    context = replace(make_context(tmp_path, "resnet", "convnext"), objective=objective)
    plain = replace(context, objective="accuracy")
    reference = Consult().run(context)
    one = Score().run(context, intact(context, "convnext"), reference)
    accuracy = Score().run(plain, intact(plain, "convnext"), Consult().run(plain))
    assert one.accuracy == accuracy.value == accuracy.accuracy
    assert one.objective == objective and 0 <= one.value <= 1
    if objective == "kl":
        donors = [context.lowered[name].program for name in ("resnet", "convnext")]
        images = next(iter(context.data.probe.batches(64)))[0]
        with torch.no_grad():
            p = sum(donor.eval()(images).softmax(1) for donor in donors) / 2
            q = donors[1](images).softmax(1)
        assert one.estimate == pytest.approx(-float((p * (p / q).log()).sum(1).mean()), abs=1e-5)
        assert one.value == pytest.approx(np.exp(one.estimate))
    assert (Score().inputs(context) == Score().inputs(plain)) == (objective == "accuracy")


def test_donors_are_asked_about_the_probes_only_where_the_objective_needs_it(tmp_path):
    context = make_context(tmp_path, "resnet")
    data = context.data
    bare = Data("bare", None, *(Split(s.images, None) for s in (data.probe, data.validation, data.heldout)))
    asked = {
        (name, kind.classes is None): len(Consult().run(replace(context, data=kind, objective=name)).beliefs) > 0
        for name in ("accuracy", "kl", "snip")
        for kind in (data, bare)
    }
    yes = {("kl", True), ("kl", False), ("snip", True)}
    assert {key for key, was in asked.items() if was} == yes


def test_an_assembly_replaces_another_by_paired_accuracy_or_by_the_objective():
    right = np.array([True] * 10 + [False] * 10)
    worse = Scores(0.0, True, right)
    assert Scores(0.0, True, right | (np.arange(20) < 12)).beats(worse)
    assert not Scores(0.0, True, right ^ (np.arange(20) > 17) ^ (np.arange(20) < 2)).beats(worse)
    low, high = (Scores(0.0, True, right, "kl", value, np.exp(value)) for value in (-0.3, -0.1))
    assert high.beats(low) and not low.beats(high) and high.value == pytest.approx(np.exp(-0.1))


def test_a_proxy_that_sees_float32_alone_is_refused_in_other_precisions():
    check_objective("snip", ("fp32",))
    check_objective("kl", ("fp32", "int8"))
    with pytest.raises(UsageError, match=r"--objective snip .*fp32, int8.*accuracy or kl"):
        check_objective("snip", ("fp32", "int8"))
    with pytest.raises(UsageError, match="bf16"):
        check_objective("naswot", ("bf16",))


def test_an_unknown_objective_is_refused_by_name():
    assert resolve({"objective": "synflow"}, {}, None).objective == "synflow"
    with pytest.raises(UsageError, match=r"--objective: 'naswat' is none of accuracy, .*did you mean 'naswot'"):
        resolve({"objective": "naswat"}, {}, None)
