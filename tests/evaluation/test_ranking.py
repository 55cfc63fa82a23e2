"""Ranking and reliability against scikit-learn and against loops over pairs and thresholds in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from psa_fast.evaluation.ranking import BINS, ranking, reliability

RNG = np.random.default_rng(0)
WORLDS = {
    "distinct": (RNG.random(70) < 0.4, RNG.random(70)),
    "tied": (RNG.random(90) < 0.3, RNG.integers(0, 6, 90) / 5),
    "all equal": (np.arange(11) % 3 == 0, np.full(11, 0.25)),
    "perfect": (np.arange(300) < 40, np.where(np.arange(300) < 40, 0.9, 0.1)),
    "reversed": (np.arange(20) < 7, np.arange(20) / 20),
    "one of each": (np.array([True, False]), np.array([0.5, 0.5])),
    "twenty": (
        np.arange(220) < 20,
        np.where(np.arange(220) == 19, 0.05, np.r_[np.full(20, 0.8), np.arange(200) / 300]),
    ),
    "a hundred": (np.arange(130) < 30, np.r_[np.full(30, 0.7), [0.9], np.arange(99) / 150]),
}


def brute(unsafe, scores):
    """The four of them by comparing every pair and trying every threshold, in whole numbers."""
    rows = list(zip(map(bool, unsafe), map(float, scores), strict=True))
    risky, safe = [s for u, s in rows if u], [s for u, s in rows if not u]
    wins = sum(Fraction((a > b) + (a >= b), 2) for a in risky for b in safe)
    points = [(sum(s >= t for s in risky), sum(s >= t for s in safe)) for t in sorted({*risky, *safe}, reverse=True)]
    precision, before = Fraction(0), 0
    for hits, alarms in points:
        precision += Fraction(hits - before, len(risky)) * Fraction(hits, hits + alarms)
        before = hits
    return {
        "auroc": wins / (len(risky) * len(safe)),
        "auprc": precision,
        "fpr_at_95_tpr": min(Fraction(a, len(safe)) for h, a in points if 20 * h >= 19 * len(risky)),
        "tpr_at_1_fpr": max([Fraction(h, len(risky)) for h, a in points if 100 * a <= len(safe)], default=Fraction(0)),
    }


@pytest.mark.parametrize("name", WORLDS)
def test_ranking_is_what_every_pair_and_every_threshold_say(name):
    unsafe, scores = WORLDS[name]
    found = ranking(unsafe, scores)
    expected = brute(unsafe, scores)
    assert set(found) == set(expected)
    for metric, estimate in found.items():
        assert estimate.value == pytest.approx(float(expected[metric]), abs=1e-12), metric
        assert 0.0 <= estimate.low <= estimate.high <= 1.0
        assert estimate.n == len(unsafe)
    assert found["auroc"].value == pytest.approx(roc_auc_score(unsafe, scores), abs=1e-12)
    assert found["auprc"].value == pytest.approx(average_precision_score(unsafe, scores), abs=1e-12)


def test_the_intervals_are_those_of_resampled_rows():
    unsafe, scores = WORLDS["tied"]
    rng = np.random.default_rng(5)
    drawn = {name: [] for name in ranking(unsafe, scores)}
    while len(drawn["auroc"]) < 200:
        rows = rng.integers(0, 90, 90)
        if unsafe[rows].all() or not unsafe[rows].any():
            continue
        for name, value in brute(unsafe[rows], scores[rows]).items():
            drawn[name].append(float(value))
    for name, estimate in ranking(unsafe, scores).items():
        low, high = np.percentile(drawn[name], [2.5, 97.5])
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.07), name


@pytest.mark.parametrize("unsafe", [[], [True] * 3, [False] * 3])
def test_one_class_or_no_row_has_no_ranking(unsafe):
    for estimate in ranking(unsafe, [0.5] * len(unsafe)).values():
        assert (estimate.value, estimate.low, estimate.high, estimate.n) == (None, None, None, len(unsafe))
        assert estimate.reason == ("only one of unsafe and safe occurs" if unsafe else "no rows")


@pytest.mark.parametrize("name", WORLDS)
def test_reliability_is_that_of_a_loop_over_bins(name):
    unsafe, scores = WORLDS[name]
    found = reliability(unsafe, scores)
    gap = 0.0
    for number in range(BINS):
        last = number == BINS - 1
        chosen = [i for i, s in enumerate(scores) if number <= s * BINS and (last or s * BINS < number + 1)]
        gap += abs(sum(float(scores[i]) - bool(unsafe[i]) for i in chosen))
    assert found["ece"].value == pytest.approx(gap / len(scores), abs=1e-12)
    assert found["brier"].value == pytest.approx(brier_score_loss(unsafe, scores), abs=1e-12)
    for estimate in found.values():
        assert estimate.low <= estimate.value + 1e-12 or estimate is found["ece"]
        assert estimate.low <= estimate.high


def test_reliability_of_one_class_and_of_nothing():
    assert reliability([False, False], [0.25, 0.75])["brier"].value == pytest.approx((0.0625 + 0.5625) / 2)
    assert reliability([], [])["ece"].value is None


@pytest.mark.parametrize("metric", [ranking, reliability])
@pytest.mark.parametrize(("unsafe", "scores"), [([True], [0.5, 0.5]), ([True, False], [float("nan"), 0.5])])
def test_scores_that_are_none_are_refused(metric, unsafe, scores):
    with pytest.raises(ValueError, match=r"1 labels and 2 scores|not finite"):
        metric(unsafe, scores)
    if metric is reliability:
        with pytest.raises(ValueError, match="not in"):
            metric([True], [1.5])
