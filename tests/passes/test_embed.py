"""The similarities of real donors' cuts against a direct computation, in each form that they are made in."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from derc.artifacts import CutId
from derc.data import Split
from derc.errors import UsageError
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed, full_bytes
from derc.passes.lower import Lower
from derc.similarity import ESTIMATORS
from tests.test_similarity import ORACLES, linear_cka
from tests.world import make_context

FAMILIES = ("resnet", "vit")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    context = make_context(tmp_path_factory.mktemp("store"), *FAMILIES, probe=70)
    return context, CutDonors().run(context, Lower().run(context))


def values_of(context, cut: CutId) -> np.ndarray:
    x = next(iter(context.data.probe.batches(70)))[0]
    if cut.cut == 0:
        return x.flatten(1).double().numpy()
    with torch.no_grad():
        return context.lowered[cut.donor].block(0, cut.cut).eval()(x).flatten(1).double().numpy()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_full_form_of_real_donors(world, estimator) -> None:
    context, cuts = world
    found = Embed(similarity=estimator, batch=30).run(context, cuts)
    assert (found.images, found.estimator, found.rows) == (70, ESTIMATORS[estimator], None)
    assert set(found.accuracy) == set(FAMILIES)
    chosen = [CutId("resnet", 3), CutId("vit", 2), CutId("vit", 4), CutId("resnet", 6)]
    for one, other in combinations(chosen, 2):
        a, b = values_of(context, one), values_of(context, other)
        place = found.position[one], found.position[other]
        assert found.similarity[place] == pytest.approx(ORACLES[estimator](a, b), abs=1e-4)
        if estimator != "rbf":
            for half, part in enumerate((slice(0, 35), slice(35, 70))):
                assert found.halves[half][place] == pytest.approx(ORACLES[estimator](a[part], b[part]), abs=1e-4)
    assert found.alike(*place) == found.similarity[place]


def test_the_inputs_are_alike(world) -> None:
    context, cuts = world
    found = Embed().run(context, cuts)
    place = found.position[CutId("resnet", 0)], found.position[CutId("vit", 0)]
    assert found.similarity[place] == pytest.approx(1)


def test_wide_features_are_halved_and_pooled_ones_are_means(world) -> None:
    context, cuts = world
    plain, narrow, pooled = (
        Embed(**options).run(context, cuts) for options in ({}, {"max_features": 200}, {"pool": True})
    )
    assert pooled.estimator == "linear CKA, pooled"
    assert not np.allclose(narrow.similarity, plain.similarity)
    one, other = CutId("resnet", 3), CutId("vit", 2)
    kinds = [cuts.donors[cut.donor].cuts[cut.cut].type for cut in (one, other)]
    a = values_of(context, one).reshape(70, *kinds[0].shape).mean((2, 3))
    b = values_of(context, other).reshape(70, *kinds[1].shape)[:, kinds[1].prefix :].mean(1)
    place = pooled.position[one], pooled.position[other]
    assert pooled.similarity[place] == pytest.approx(linear_cka(a, b), abs=1e-4)


def test_streamed_and_sketched_forms_agree_with_the_debiased_one(world) -> None:
    context, cuts = world
    full = Embed(similarity="cka-debiased").run(context, cuts)
    streamed = Embed(form="streamed").run(context, cuts)
    sketched = Embed(form="sketched").run(context, cuts)
    assert streamed.estimator == "linear CKA, unbiased, streamed"
    assert sketched.estimator == "linear CKA, unbiased, sketched"
    assert streamed.accuracy == sketched.accuracy == full.accuracy
    assert streamed.halves.shape == full.halves.shape
    assert np.abs(streamed.similarity - full.similarity).mean() < 0.05
    assert sketched.similarity.size == 0
    n = len(sketched.index)
    alike = np.array([[sketched.alike(a, b) for b in range(n)] for a in range(n)])
    np.testing.assert_allclose(alike, streamed.similarity, atol=0.13)


def test_the_form_follows_from_the_size(world) -> None:
    step = Embed()
    assert step.form_for(384, 512) == step.form_for(384, 1024) == "full"
    assert step.form_for(384, 4096) == "streamed"
    assert step.form_for(8192, 512) == "streamed"
    assert step.form_for(8193, 512) == "sketched"
    assert Embed(form="streamed").form_for(10, 10) == "streamed"
    assert full_bytes(384, 1024, "r2") == 2 * full_bytes(384, 1024, "cka")
    with pytest.raises(UsageError, match="unknown form"):
        Embed(form="whole").form_for(10, 10)


def test_what_cannot_be_done_is_said(world) -> None:
    context, cuts = world
    with pytest.raises(UsageError, match="--similarity r2 needs all probe images at once"):
        Embed(similarity="r2", form="streamed").run(context, cuts)
    with pytest.raises(UsageError, match="unknown similarity"):
        Embed(similarity="cosine").run(context, cuts)


@pytest.mark.parametrize("form", ["full", "streamed", "sketched"])
def test_remainders_of_few_images_are_no_trouble(world, form) -> None:
    context, cuts = world
    probe = context.data.probe
    for images in (8, 65, 67):
        part = Split(probe.images[:images], probe.labels[:images])
        few = replace(context, data=replace(context.data, probe=part))
        found = Embed(form=form, similarity="cka-debiased").run(few, cuts)
        assert found.images == images
        assert np.isfinite(found.similarity if found.rows is None else found.rows).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e17])
def test_activations_that_are_no_numbers_name_the_donor(world, value) -> None:
    context, cuts = world
    lowered = context.lowered["vit"]
    weight = next(lowered.module.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(value)
    try:
        with pytest.raises(UsageError, match="donor vit gives NaN or infinite activations"):
            Embed().run(context, cuts)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
