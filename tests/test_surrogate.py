"""The model of losses against the textbook's formulas, written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from derc import surrogate
from derc.artifacts import Array
from derc.surrogate import NOISE, Group, Surrogate, fit, indicators

EDGES = 12


def groups(seed: int = 0) -> tuple[Group, ...]:
    random = np.random.default_rng(seed)
    keys = [None if key == 0 else int(key) for key in random.integers(0, 4, EDGES)]
    return Group("size", 0.5, values=random.standard_normal((EDGES, 2))), indicators("block", 0.8, keys)


def paths(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [tuple(map(int, random.choice(EDGES, 3, replace=False))) for _ in range(count)]


def known(count: int, seed: int = 2) -> tuple[Surrogate, Array]:
    """A model with given spreads, and its features as one design matrix (edges, features), scaled."""
    random = np.random.default_rng(seed)
    spreads = {"size": 0.3, "block": 0.2, NOISE: 0.1}
    prior = random.uniform(0, 1, EDGES)
    model = Surrogate(groups(), prior, tuple(paths(count)), random.standard_normal(count), spreads)
    dense, keyed = model.groups
    assert dense.values is not None and keyed.keys is not None
    blocks = (keyed.keys[:, None] == np.arange(keyed.size)).astype(float)
    return model, np.concatenate([0.3 * dense.values, 0.2 * blocks], axis=1)


def posterior(model: Surrogate, design: Array) -> tuple[Array, Array]:
    """Mean and covariance of the edges' losses by the normal equations in feature space."""
    rows = np.array([design[list(path)].sum(axis=0) for path in model.paths]).reshape(-1, design.shape[1])
    residual = np.array([v - model.prior[list(p)].sum() for p, v in zip(model.paths, model.values, strict=True)])
    covariance = np.linalg.inv(rows.T @ rows / 0.01 + np.eye(design.shape[1]))
    return model.prior + design @ covariance @ rows.T @ residual / 0.01, design @ covariance @ design.T


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_the_mean_is_that_of_the_explicit_regression(count: int) -> None:
    model, design = known(count)
    assert model.mean == pytest.approx(posterior(model, design)[0], abs=1e-8)


@pytest.mark.parametrize("count", [0, 6])
def test_draws_have_the_posterior_mean_and_covariance(count: int) -> None:
    model, design = known(count)
    random = np.random.default_rng(0)
    draws = np.array([model.draw(random) for _ in range(6000)])
    mean, covariance = posterior(model, design)
    deviations = np.sqrt(np.diag(covariance)) + 1e-12
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * deviations / np.sqrt(6000) + 1e-9).all()
    assert np.cov(draws.T) == pytest.approx(covariance, abs=0.08 * float(covariance.max()))


def test_the_deviation_is_that_of_the_path() -> None:
    model, design = known(6)
    covariance = posterior(model, design)[1]
    for path in paths(10, seed=9):
        expected = np.sqrt(covariance[np.ix_(path, path)].sum())
        assert model.deviation(path) == pytest.approx(expected, abs=1e-8)


def test_the_evidence_is_that_of_the_normal_distribution() -> None:
    random = np.random.default_rng(4)
    sums = {group.name: group.sums(paths(7)) for group in groups()}
    kernels = {name: part @ part.T for name, part in sums.items()}
    residual = random.standard_normal(7)

    def exact(spreads: dict[str, float]) -> float:
        covariance = sum(
            (spreads[name] ** 2 * kernel for name, kernel in kernels.items()), spreads[NOISE] ** 2 * np.eye(7)
        )
        root = np.linalg.cholesky(covariance)
        scale = surrogate._scale_of(root, residual)
        likely = multivariate_normal(np.zeros(7), scale**2 * covariance).logpdf(residual)
        weight, guess = surrogate.SCALE_WEIGHT, surrogate.SCALE
        return float(likely - weight * np.log(scale) - weight * guess**2 / scale**2 / 2)

    one, two = {"size": 0.5, "block": 0.8, NOISE: 0.2}, {"size": 1.5, "block": 0.1, NOISE: 0.4}
    none = dict.fromkeys(one, 0.0)
    found = [surrogate._evidence(kernels, spreads, residual, none) for spreads in (one, two)]
    assert found[0] - found[1] == pytest.approx(exact(one) - exact(two), abs=1e-6)


def test_the_scale_is_the_most_likely_one() -> None:
    root, residual = np.linalg.cholesky(np.diag([1.0, 2.0, 0.5])), np.array([0.3, -0.2, 0.1])

    def density(scale: float) -> float:
        likely = multivariate_normal(np.zeros(3), scale**2 * root @ root.T).logpdf(residual)
        weight, guess = surrogate.SCALE_WEIGHT, surrogate.SCALE
        return float(likely - weight * np.log(scale) - weight * guess**2 / scale**2 / 2)

    best = surrogate._scale_of(root, residual)
    assert all(density(best) >= density(best * factor) for factor in (0.9, 0.99, 1.01, 1.1))


@pytest.mark.parametrize("unit", [1e-2, 1.0, 1e3])
def test_fitting_finds_which_features_matter_in_any_unit(unit: float) -> None:
    random = np.random.default_rng(5)
    parts = (indicators("a", 0.5, list(range(EDGES))), Group("b", 0.5, values=random.standard_normal((EDGES, 1))))
    truth = unit * random.standard_normal(EDGES)
    seen = paths(120, seed=6)
    values = np.array([truth[list(path)].sum() for path in seen]) + 0.05 * unit * random.standard_normal(120)
    model = fit(parts, np.zeros(EDGES), seen, values, noise=0.2)
    assert model.spreads["a"] == pytest.approx(unit, rel=0.6)
    assert model.spreads["b"] < model.spreads["a"]
    assert model.spreads[NOISE] == pytest.approx(0.05 * unit, rel=0.8)
    assert model.mean == pytest.approx(truth, abs=0.2 * unit)


def test_the_same_network_seen_twice_and_equal_values_do_no_harm() -> None:
    path = paths(1)[0]
    model = fit(groups(), np.zeros(EDGES), [path] * 30, np.full(30, 0.25), noise=0.2)
    assert model.mean[list(path)].sum() == pytest.approx(0.25, abs=0.01)
    draws = [model.draw(np.random.default_rng(seed))[list(path)].sum() for seed in range(200)]
    assert np.isfinite(draws).all()
    assert np.std(draws) < 0.05


def test_what_the_prior_was_made_from_does_not_shrink_the_scale() -> None:
    prior = np.linspace(0, 1, EDGES)
    mine, values = paths(10), np.array([0.4, -0.3])
    exact = np.array([prior[list(path)].sum() for path in mine[2:]])
    seen = np.concatenate([values + [prior[list(path)].sum() for path in mine[:2]], exact])
    telling = [True, True] + [False] * 8
    naive = fit(groups(), prior, mine, seen, 0.2)
    judged = fit(groups(), prior, mine, seen, 0.2, telling)
    alone = fit(groups(), prior, mine[:2], seen[:2], 0.2)
    assert judged.spreads == alone.spreads
    assert judged.spreads["block"] > naive.spreads["block"]


def test_without_data_the_prior_stays() -> None:
    model = fit(groups(), np.linspace(0, 1, EDGES), [], np.zeros(0), noise=0.2)
    assert model.mean == pytest.approx(np.linspace(0, 1, EDGES))
    assert model.spreads["block"] == pytest.approx(0.8 * surrogate.SCALE)


def test_what_fixed_features_explain_does_not_bear_on_the_scale() -> None:
    level = Group("level", 1.0, values=np.ones((EDGES, 1)), fixed=True)
    seen, random = paths(30), np.random.default_rng(8)
    values = 0.01 * random.standard_normal(30)
    near, far = (fit((level, *groups()), np.zeros(EDGES), seen, values + shift, 0.2) for shift in (0.0, 0.5))
    assert far.spreads["level"] == 1.0
    assert far.spreads == pytest.approx(near.spreads)
    assert far.spreads["block"] < 0.05
    assert far.mean[list(seen[0])].sum() == pytest.approx(near.mean[list(seen[0])].sum() + 0.5, abs=0.01)
