"""Similarities against a direct float64 computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from derc.artifacts import CutId
from derc.passes.cut import CutDonors
from derc.passes.embed import Embed, centred_gram, similarity
from derc.passes.lower import Lower
from tests.world import make_context


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Feature-space form (Kornblith et al. 2019): ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


@given(st.integers(0, 1000), st.integers(4, 20), st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None)
def test_similarity_is_linear_cka(seed, n, p, q):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, p)), rng.standard_normal((n, q))
    found = similarity([centred_gram(torch.from_numpy(v)) for v in (x, y)])
    assert found[0, 1] == pytest.approx(linear_cka(x, y), abs=1e-9)
    assert found[0, 0] == pytest.approx(1)
    np.testing.assert_allclose(found, found.T, atol=1e-12)


def debiased_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    cross = one @ k @ one * (one @ m @ one) / (n - 1) / (n - 2)
    return (np.trace(k @ m) + cross - 2 / (n - 2) * (one @ k @ m @ one)) / n / (n - 3)


def test_debiased_estimator_against_its_definition():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 7))
    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    want = debiased_hsic(k, m) / np.sqrt(debiased_hsic(k, k) * debiased_hsic(m, m))
    grams = [centred_gram(torch.from_numpy(v), debiased=True) for v in (x, y)]
    product = (grams[0] * grams[1]).sum() / np.sqrt((grams[0] ** 2).sum() * (grams[1] ** 2).sum())
    assert product == pytest.approx(want, abs=1e-12)


def test_embed_of_real_donors(tmp_path):
    context = make_context(tmp_path, "resnet", "vit")
    lowered = Lower().run(context)
    cuts = CutDonors().run(context, lowered)
    found = Embed(batch=30).run(context, cuts)
    assert found.images == 64
    assert set(found.accuracy) == {"resnet", "vit"}
    position = found.position
    a, b = CutId("resnet", 3), CutId("vit", 2)
    x = next(iter(context.data.probe.batches(64)))[0]
    with torch.no_grad():
        values = [context.lowered[c.donor].block(0, c.cut)(x).flatten(1).double().numpy() for c in (a, b)]
    assert found.similarity[position[a], position[b]] == pytest.approx(linear_cka(*values), abs=1e-4)
    inputs = found.similarity[position[CutId("resnet", 0)], position[CutId("vit", 0)]]
    assert inputs == pytest.approx(1)
    pooled = Embed(batch=30, max_features=200).run(context, cuts)
    assert np.isfinite(pooled.similarity).all()
    assert not np.allclose(pooled.similarity, found.similarity)
