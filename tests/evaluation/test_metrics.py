"""Metrics against scikit-learn and closed forms, their intervals, and what happens where a metric has no value."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

from psa_fast.evaluation.metrics import accuracy, macro_f1, quadratic_kappa, rate
from psa_fast.evaluation.ranking import auroc


@pytest.fixture
def labels():
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 7, 300)
    return targets, np.where(rng.random(300) < 0.7, targets, rng.integers(0, 6, 300))


def test_values_equal_scikit_learn(labels):
    targets, predictions = labels
    assert accuracy(targets, predictions).value == pytest.approx((targets == predictions).mean())
    assert macro_f1(targets, predictions, 7).value == pytest.approx(f1_score(targets, predictions, average="macro"))
    kept = targets < 4  # a class that is only predicted counts as well
    assert macro_f1(targets[kept], predictions[kept], 7).value == pytest.approx(
        f1_score(targets[kept], predictions[kept], average="macro", zero_division=0)
    )
    oracle = cohen_kappa_score(targets % 4, predictions % 4, weights="quadratic")
    assert quadratic_kappa(targets % 4, predictions % 4, 4).value == pytest.approx(oracle)
    scores = np.round(np.random.default_rng(0).normal(size=300) + (targets > 3), 1)  # rounded: ties
    assert auroc(targets > 3, scores).value == pytest.approx(roc_auc_score(targets > 3, scores))


def test_bootstrap_interval_is_that_of_resampled_rows(labels):
    """The multinomial shortcut against resampling rows one by one with scikit-learn's own metric."""
    targets, predictions = labels
    scores = np.random.default_rng(0).normal(size=300) + (targets > 3)
    rng = np.random.default_rng(1)
    kappas, areas = [], []
    for _ in range(600):
        rows = rng.integers(0, 300, 300)
        kappas.append(cohen_kappa_score(targets[rows], predictions[rows], weights="quadratic"))
        areas.append(roc_auc_score(targets[rows] > 3, scores[rows]))
    for ours, samples in ((quadratic_kappa(targets, predictions, 7), kappas), (auroc(targets > 3, scores), areas)):
        low, high = np.percentile(samples, [2.5, 97.5])
        width = high - low
        assert ours.low == pytest.approx(low, abs=0.15 * width)
        assert ours.high == pytest.approx(high, abs=0.15 * width)
        assert ours.low < ours.value < ours.high
    assert auroc(targets > 3, scores, seed=5) == auroc(targets > 3, scores, seed=5)


def test_wilson_interval():
    """Against the score equation itself: a bound b solves |p - b| = z sqrt(b (1 - b) / n)."""
    for hits, n in ((3, 50), (25, 50), (0, 400), (400, 400)):
        estimate = rate([True] * hits + [False] * (n - hits))
        for bound in (estimate.low, estimate.high):
            if 0 < bound < 1:
                assert abs(hits / n - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / n) ** 0.5, rel=1e-5)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert rate([False] * 400).high == pytest.approx(0.0095, abs=1e-4)


def test_undefined_metrics_have_a_reason():
    for estimate in (
        rate([]),
        accuracy([], []),
        macro_f1([], [], 7),
        quadratic_kappa([2, 2], [2, 2], 4),
        auroc([True, True], [0.1, 0.2]),
        auroc([], []),
    ):
        assert estimate.value is estimate.low is estimate.high is None
        assert estimate.reason
        assert set(estimate.to_json()) == {"value", "low", "high", "n", "reason"}
    # one class in the targets only: wrong everywhere, but defined
    assert quadratic_kappa([2, 2], [1, 1], 4).value == pytest.approx(0.0)
    assert set(rate([True]).to_json()) == {"value", "low", "high", "n"}


def test_rare_class_does_not_break_the_bootstrap():
    estimate = auroc([True] + [False] * 30, np.arange(31))
    assert 0 <= estimate.low <= estimate.high <= 1


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        auroc([True, False], [float("nan"), 0.0])
    with pytest.raises(ValueError, match="outside"):
        quadratic_kappa([4], [0], 4)
