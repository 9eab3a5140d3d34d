"""Every similarity against a direct float64 computation from the features, written from the definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc import similarity, streaming
from derc.errors import UsageError

Features = np.ndarray


def linear_cka(x: Features, y: Features) -> float:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) on centred features (Kornblith et al. 2019, in feature space)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def unbiased_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    cross = one @ k @ one * (one @ m @ one) / (n - 1) / (n - 2)
    return (np.trace(k @ m) + cross - 2 / (n - 2) * (one @ k @ m @ one)) / n / (n - 3)


def debiased_cka(x: Features, y: Features) -> float:
    k, m = x @ x.T, y @ y.T
    value = unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    return float(np.clip(value, 0, 1))


def rbf_kernel(x: Features) -> np.ndarray:
    distance = np.array([np.linalg.norm(x - row, axis=1) for row in x])
    pairs = [distance[i, j] ** 2 for i in range(len(x)) for j in range(i)]
    return np.exp(-(distance**2) / (2 * 0.5**2 * np.median(pairs)))


def rbf_cka(x: Features, y: Features) -> float:
    n = len(x)
    h = np.eye(n) - 1 / n
    k, m = h @ rbf_kernel(x) @ h, h @ rbf_kernel(y) @ h
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def ridge_share(x: Features, y: Features) -> float:
    """The share of y's variance that a ridge regression on x explains in sample, by x's singular vectors."""
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = (x**2).sum() / len(x)
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    fitted = (left * (values**2 / (values**2 + penalty))) @ (left.T @ y)
    return 1 - ((y - fitted) ** 2).sum() / (y**2).sum()


def regression(x: Features, y: Features) -> float:
    there, back = ridge_share(x, y) / ridge_share(y, y), ridge_share(y, x) / ridge_share(x, x)
    return float(np.clip((there + back) / 2, 0, 1))


ORACLES: dict[str, Callable[[Features, Features], float]] = {
    "cka": linear_cka,
    "cka-debiased": debiased_cka,
    "rbf": rbf_cka,
    "r2": regression,
}


def features(seed: int, n: int, widths: tuple[int, ...]) -> list[Features]:
    """Float32 features with something in common, of any scale and far from the origin."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((n, 6))
    made = [common @ random.standard_normal((6, p)) + random.standard_normal((n, p)) for p in widths]
    return [(10.0 ** random.integers(-3, 4) * (part + 1)).astype(np.float32) for part in made]


@pytest.mark.parametrize("estimator", ORACLES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 40), widths=st.tuples(*[st.integers(1, 60)] * 4))
def test_against_float64_from_the_features(estimator: str, seed: int, n: int, widths: tuple[int, ...]) -> None:
    values = features(seed, n, widths)
    found = similarity.similarity(values, estimator)
    for a, x in enumerate(values):
        for b, y in enumerate(values[:a]):
            want = ORACLES[estimator](x.astype(np.float64), y.astype(np.float64))
            assert found[a, b] == pytest.approx(want, abs=1e-5), (estimator, n, widths)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(np.diag(found), 1)


@pytest.mark.parametrize("estimator", ORACLES)
def test_many_images_and_several_chunks_of_columns(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "CHUNK", 1000)
    values = features(1, 301, (40, 300, 700, 8))
    found = similarity.similarity(values, estimator)
    for a in range(4):
        for b in range(a):
            want = ORACLES[estimator](values[a].astype(np.float64), values[b].astype(np.float64))
            assert found[a, b] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("estimator", ORACLES)
def test_a_constant_value_is_like_nothing(estimator: str) -> None:
    values = [*features(2, 20, (5, 7)), np.full((20, 3), 0.1, np.float32)]
    found = similarity.similarity(values, estimator)
    np.testing.assert_array_equal(found[2], [0, 0, 1])


def test_r2_sees_a_linear_map_and_little_else() -> None:
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((400, 10)).astype(np.float32) for _ in range(2))
    found = similarity.similarity(
        [x, x @ np.linalg.qr(random.standard_normal((10, 10)))[0].astype(np.float32), y], "r2"
    )
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[0, 2] < 0.1


def test_unknown_estimator_and_too_few_images() -> None:
    with pytest.raises(UsageError, match=r"unknown similarity 'cca', known: cka.*did you mean 'cka'"):
        similarity.similarity([np.zeros((8, 2), np.float32)], "cca")
    with pytest.raises(UsageError, match=r"at least 4 images, not 3: give more to --probe"):
        similarity.similarity([np.zeros((3, 2), np.float32)], "cka-debiased")
    with pytest.raises(UsageError, match="at least 4 images"):
        streaming.bounds(3)


@pytest.mark.parametrize("images", [*range(4, 20), 63, 64, 65, 66, 67, 100, 127, 128, 129, 130, 131, 193, 512, 1000])
def test_batches_hold_every_image_once_and_four_at_least(images: int) -> None:
    bounds = streaming.bounds(images)
    assert [i for first, last in bounds for i in range(first, last)] == list(range(images))
    assert all(4 <= last - first <= 64 for first, last in bounds)
    assert len(bounds) == 1 or len(bounds) % 2 == 0


def streamed(values: list[Features], estimator: str = "cka") -> streaming.Streamed:
    n = len(values[0])
    bounds = streaming.bounds(n)
    products = streaming.Streamed(len(values))
    for number, (first, last) in enumerate(bounds):
        parts = streaming.vectors([part[first:last] for part in values], (last - first) / n, estimator)
        products.add(parts, 2 * number // len(bounds))
    return products


@pytest.mark.parametrize("images", [8, 65, 130, 301])
def test_streamed_against_summed_unbiased_hsic(images: int) -> None:
    values = features(images, images, (5, 30, 80))
    got = streamed(values)
    bounds = streaming.bounds(images)

    def summed(x: Features, y: Features, part: list[tuple[int, int]]) -> float:
        pieces = [(x[a:b].astype(np.float64), y[a:b].astype(np.float64)) for a, b in part]
        return sum(len(u) * unbiased_hsic(u @ u.T, v @ v.T) for u, v in pieces)

    def want(x: Features, y: Features, part: list[tuple[int, int]]) -> float:
        return float(np.clip(summed(x, y, part) / np.sqrt(summed(x, x, part) * summed(y, y, part)), 0, 1))

    middle = len(bounds) // 2
    for a in range(3):
        for b in range(a):
            assert got.similarity()[a, b] == pytest.approx(want(values[a], values[b], bounds), abs=1e-5)
            for half, part in enumerate((bounds[:middle], bounds[middle:])):
                found = got.similarity_of_halves()[half, a, b]
                assert found == pytest.approx(want(values[a], values[b], part), abs=1e-5)


def test_a_thousand_probes_in_batches_are_within_a_hundredth() -> None:
    """The mean error against the debiased similarity of a population of 8,000 images."""
    random = np.random.default_rng(0)
    common = random.standard_normal((8000, 12))
    values = []
    for depth in np.linspace(0, 1, 12):
        mixed = common * np.exp(-4 * (np.linspace(0, 1, 12) - depth) ** 2)
        noise = 0.3 * random.standard_normal((8000, 40))
        values.append((mixed @ random.standard_normal((12, 40)) + noise).astype(np.float32))
    gram = [part - part.mean(0) for part in values]
    whole = np.array([[linear_cka(x, y) for y in gram] for x in gram])
    errors = []
    for start in range(0, 4000, 1000):
        got = streamed([part[start : start + 1000] for part in values]).similarity()
        errors.append(np.abs(got - whole)[np.triu_indices(12, 1)].mean())
    assert np.mean(errors) < 0.01, errors


def test_sketched_rows_keep_similarities_whatever_the_order_of_values() -> None:
    values = features(5, 300, (20, 50, 90, 200))
    want = streamed(values).similarity()
    bounds = streaming.bounds(300)

    def rows(chosen: list[int]) -> np.ndarray:
        sketch = streaming.Sketched(len(bounds))
        found = np.zeros((len(chosen), sketch.size), np.float32)
        for number, (first, last) in enumerate(bounds):
            parts = streaming.vectors([values[i][first:last] for i in chosen], (last - first) / 300, "cka")
            found[:, sketch.columns[number] : sketch.columns[number + 1]] = sketch.project(parts, number)
        return streaming.unit_rows(found)

    found = rows([0, 1, 2, 3])
    np.testing.assert_allclose(found @ found.T, want, atol=4 / np.sqrt(streaming.SKETCH))
    np.testing.assert_allclose(rows([2, 0])[0], found[2], atol=1e-6)


def test_r2_in_batches_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--similarity r2 needs all probe images at once"):
        streaming.refuse_regression("r2")
