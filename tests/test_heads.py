"""Closed-form classifiers against numpy's least squares, refits without the left-out rows, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from derc import logistic
from derc.heads import STRENGTHS, fit, folds, principal, ridge, temperature
from derc.logistic import Logistic


def problem(n: int, d: int, classes: int, *, seed: int = 0, noise: float = 1.0):
    """Features far from zero, of very different scales, and labels in uneven shares."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, classes + 1, n), classes - 1)
    labels[: 2 * classes] = np.arange(2 * classes) % classes
    centres = rng.normal(size=(classes, d))
    scales = np.exp(-4 * np.arange(d) / d)
    return (centres[labels] + noise * rng.normal(size=(n, d))) * scales + 5, labels


def least_squares(x, labels, classes, penalty):
    """Weight and bias by numpy.linalg.lstsq on the rows with the penalty as rows of their own."""
    y = np.eye(classes)[labels]
    rows = np.vstack([np.hstack([x, np.ones((len(x), 1))]), np.sqrt(penalty) * np.eye(x.shape[1] + 1)[:-1]])
    solution = np.linalg.lstsq(rows, np.vstack([y, np.zeros((x.shape[1], classes))]), rcond=None)[0]
    return solution[:-1], solution[-1]


def in_parts(x, labels):
    return lambda: ((x[part], labels[part]) for part in folds(labels))


@pytest.mark.parametrize(("n", "d"), [(200, 12), (60, 90)])
def test_ridge_is_penalised_least_squares_up_to_its_scale(n, d):
    x, labels = problem(n, d, 4)
    found = ridge(in_parts(x, labels), 4)
    unit = np.square(x - x.mean(0)).sum() / d
    weight, bias = least_squares(x, labels, 4, found.strength * unit)
    order = np.concatenate(folds(labels))
    assert temperature(found.left_out, labels[order]) == pytest.approx(1, rel=1e-6)
    factor = np.linalg.norm(found.weight) / np.linalg.norm(weight)
    np.testing.assert_allclose(found.weight, factor * weight, rtol=0, atol=1e-6 * factor * np.abs(weight).max())
    np.testing.assert_allclose(found.bias, factor * bias, rtol=0, atol=1e-6 * factor * np.abs(bias).max())


@pytest.mark.parametrize(("n", "d"), [(80, 6), (40, 70)])
def test_left_out_logits_are_those_of_fits_without_these_rows(n, d):
    x, labels = problem(n, d, 3, seed=1)
    parts = folds(labels)
    unit, y = np.square(x - x.mean(0)).sum() / d, np.eye(3)[labels]
    errors, logits = [], {}
    for strength in STRENGTHS:
        guess = np.empty((n, 3))
        for part in parts:
            rest = np.setdiff1d(np.arange(n), part)
            weight, bias = least_squares(x[rest], labels[rest], 3, strength * unit)
            guess[part] = x[part] @ weight + bias
        errors.append(np.square(y - guess).sum())
        logits[strength] = guess
    found = ridge(in_parts(x, labels), 3)
    assert found.strength == STRENGTHS[int(np.argmin(errors))]
    want = logits[found.strength][np.concatenate(parts)]
    factor = np.linalg.norm(found.left_out) / np.linalg.norm(want)
    np.testing.assert_allclose(found.left_out, factor * want, rtol=0, atol=1e-5 * factor)


def test_ridge_in_a_stream_is_ridge_at_once():
    x, labels = problem(300, 20, 5, seed=2)
    whole = principal(lambda: [(x, labels)], 5)
    stream = principal(lambda: ((x[i : i + 7], labels[i : i + 7]) for i in range(0, 300, 7)), 5)
    np.testing.assert_allclose(stream.squares, whole.squares, rtol=1e-9)
    np.testing.assert_allclose(stream.mean, x.mean(0), rtol=1e-12)
    few = principal(lambda: ((x[i : i + 7], labels[i : i + 7]) for i in range(0, 14, 7)), 5)
    np.testing.assert_allclose(
        np.sort(few.squares)[-13:], np.sort(np.linalg.svd(x[:14] - x[:14].mean(0))[1] ** 2)[-13:], rtol=1e-9
    )


def test_temperature_has_the_least_log_loss():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    logits = 0.05 * (np.eye(4)[labels] + rng.normal(size=(300, 4)))

    def loss(power):
        chance = log_softmax(10**power * logits, axis=1)
        return -(299 / 300 * chance[np.arange(300), labels] + chance.mean(1) / 300).mean()

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x
    assert np.log10(temperature(logits, labels)) == pytest.approx(best, abs=1e-6)
    assert 1 < temperature(np.eye(4)[labels], labels) < 100  # all right, and still finite


@pytest.mark.parametrize(("n", "d", "classes"), [(150, 10, 2), (200, 16, 5), (60, 80, 3)])
def test_logistic_is_scikit_learns(n, d, classes):
    x, labels = problem(n, d, classes, seed=3, noise=2.0)
    strength, weight, bias, left_out = Logistic(classes, (0.1,)).fit(x, labels, folds(labels))
    unit = np.square(x - x.mean(0)).mean()
    theirs = LogisticRegression(C=1 / (strength * unit * n), tol=1e-12, max_iter=50000)
    ours = x @ weight + bias
    theirs.fit(x, labels)
    scores = theirs.decision_function(x)
    scores = np.stack([-scores / 2, scores / 2], 1) if classes == 2 else scores
    ours, scores = (a - a.mean(1, keepdims=True) for a in (ours, scores))
    if classes > 2:  # for two, scikit-learn penalises one weight for both
        np.testing.assert_allclose(ours, scores, rtol=0, atol=1e-4 * np.abs(scores).max())
    # What is asked of the minimum itself: no slope.
    chance = np.exp(log_softmax(x @ weight + bias, axis=1)) - np.eye(classes)[labels]
    slope = x.T @ chance / n + strength * unit * weight
    assert np.abs(slope).max() < 1e-5 and np.abs(chance.mean(0)).max() < 1e-6
    assert left_out.shape == (n, classes)


def test_logistic_chooses_by_the_log_loss_of_left_out_rows():
    x, labels = problem(120, 8, 3, seed=4, noise=3.0)
    parts = folds(labels)
    strength, _, _, left_out = Logistic(3).fit(x, labels, parts)
    losses = []
    for tried in logistic.STRENGTHS:
        guess = Logistic(3, (tried,)).fit(x, labels, parts)[3]
        losses.append(-log_softmax(guess, axis=1)[np.arange(120), labels].mean())
    first_rise = next(i for i in range(1, len(losses)) if losses[i] >= losses[i - 1])
    assert strength == logistic.STRENGTHS[first_rise - 1] == logistic.STRENGTHS[int(np.argmin(losses))]
    assert -log_softmax(left_out, axis=1)[np.arange(120), labels].mean() == pytest.approx(min(losses), rel=1e-3)


def test_fit_takes_whichever_answers_more_left_out_rows_right():
    x, labels = problem(200, 10, 4, seed=5, noise=1.5)
    both, only = fit(x, labels, 4), fit(x, labels, 4, ())
    strength, weight, _, left_out = Logistic(4).fit(x, labels, folds(labels))
    better = (left_out.argmax(1) == labels).mean() > only.accuracy(labels)
    assert only.method == "ridge"
    assert both.method == ("logistic" if better else "ridge")
    np.testing.assert_array_equal(both.weight, weight if better else only.weight)
    assert both.strength == (strength if better else only.strength)


def test_every_class_of_two_is_in_two_folds():
    labels = np.array([0] * 50 + [1] * 2 + [2] * 3)
    parts = folds(labels)
    assert sorted(np.concatenate(parts)) == list(range(55))
    for label in range(3):
        assert sum(label in labels[part] for part in parts) >= 2
