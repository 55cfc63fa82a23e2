"""How well a score tells unsafe rows from safe ones, as a ranking and as a probability, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from psa_fast.evaluation.metrics import BOOTSTRAP_SAMPLES, Estimate, percentiles, undefined

BOOTSTRAP_CHUNK = 4_000_000  # resampled weights held at once
BINS = 10  # of ECE and of the reliability diagram: equal widths, each with its lower end
# unsafe and safe rows at each distinct score, from the highest one down, [samples, scores] each -> [samples]
Ranking = Callable[[np.ndarray, np.ndarray], np.ndarray]


def auroc(unsafe: Sequence[bool], scores: Sequence[float], seed: int = 0) -> Estimate:
    """Area under the ROC curve: P(score of an unsafe row > score of a safe one), ties counted half.

    Undefined, as all of this file that rank, if only one of the two kinds occurs. Raises ValueError for a score that
    is not finite.
    """
    return _ranked(unsafe, scores, _area, seed)


def auprc(unsafe: Sequence[bool], scores: Sequence[float], seed: int = 0) -> Estimate:
    """Average precision: the precision at every distinct score, weighted by the recall that it adds."""
    return _ranked(unsafe, scores, _average_precision, seed)


def fpr_at_95_tpr(unsafe: Sequence[bool], scores: Sequence[float], seed: int = 0) -> Estimate:
    """Share of safe rows flagged at the highest threshold that flags 95% of the unsafe ones."""
    return _ranked(unsafe, scores, _fpr_at_95_tpr, seed)


def tpr_at_1_fpr(unsafe: Sequence[bool], scores: Sequence[float], seed: int = 0) -> Estimate:
    """Share of unsafe rows flagged at the lowest threshold that flags at most 1% of the safe ones."""
    return _ranked(unsafe, scores, _tpr_at_1_fpr, seed)


def brier(unsafe: Sequence[bool], probabilities: Sequence[float], seed: int = 0) -> Estimate:
    """Mean squared distance of probabilities from what was the case. Raises ValueError for none in [0, 1]."""
    label, score = _checked(unsafe, probabilities, probability=True)
    squares = (score - label) ** 2
    return _resampled(label.size, lambda weights: weights @ squares / label.size, seed)


def ece(unsafe: Sequence[bool], probabilities: Sequence[float], seed: int = 0) -> Estimate:
    """Expected calibration error in BINS bins: the mean over rows of |mean probability - share of unsafe| of their bin.

    It is never below 0, so the interval of a well calibrated score lies above its true error. Raises ValueError for a
    probability that is not in [0, 1].
    """
    label, score = _checked(unsafe, probabilities, probability=True)
    gaps = np.zeros((label.size, BINS))
    gaps[np.arange(label.size), bins(score)] = score - label
    return _resampled(label.size, lambda weights: np.abs(weights @ gaps).sum(1) / label.size, seed)


def bins(probabilities: np.ndarray) -> np.ndarray:
    """The bin, 0 to BINS - 1, of each probability."""
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


def _checked(
    unsafe: Sequence[bool], scores: Sequence[float], probability: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    label, score = np.asarray(unsafe, dtype=bool), np.asarray(scores, dtype=np.float64)
    if label.shape != score.shape:
        raise ValueError(f"{label.size} labels and {score.size} scores")
    if not np.isfinite(score).all():
        raise ValueError("a score is not finite")
    if probability and not ((score >= 0) & (score <= 1)).all():
        raise ValueError("a probability is not in [0, 1]")
    return label, score


def _ranked(unsafe: Sequence[bool], scores: Sequence[float], ranking: Ranking, seed: int) -> Estimate:
    label, score = _checked(unsafe, scores)
    n = label.size
    if label.all() or not label.any():
        return undefined(n, "no rows" if n == 0 else "only one of unsafe and safe occurs")
    order = np.argsort(-score, kind="stable")
    label, score = label[order], score[order]
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # first row of each run of equal scores

    def value(weights: np.ndarray) -> np.ndarray:
        positive = np.add.reduceat(weights * label, starts, axis=1)
        negative = np.add.reduceat(weights * ~label, starts, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = ranking(positive, negative)
        # a resample of one kind only has no ranking
        return np.where((positive.sum(1) > 0) & (negative.sum(1) > 0), found, np.nan)

    return _resampled(n, value, seed)


def _resampled(n: int, value: Callable[[np.ndarray], np.ndarray], seed: int) -> Estimate:
    """`value` of the rows and of their resamples; it takes weights, [samples, n]: how often each row was drawn."""
    if n == 0:
        return undefined(0, "no rows")
    rng = np.random.default_rng(seed)
    samples = []
    left = BOOTSTRAP_SAMPLES
    while left:
        size = max(1, min(left, BOOTSTRAP_CHUNK // n))
        samples.append(value(rng.multinomial(n, np.full(n, 1.0 / n), size=size).astype(np.float64)))
        left -= size
    return percentiles(float(value(np.ones((1, n)))[0]), np.concatenate(samples), n)


def _area(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    below = negative.sum(1, keepdims=True) - np.cumsum(negative, axis=1)
    pairs = positive.sum(1) * negative.sum(1)
    return (positive * (below + 0.5 * negative)).sum(1) / pairs


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    hits, alarms = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    flagged = hits + alarms
    precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
    return (positive * precision).sum(1) / positive.sum(1)


def _fpr_at_95_tpr(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    hits, alarms = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    # whole rows: 19 of 20 are 95%, whatever the rounding of .95 * 20
    first = np.argmax(20 * hits >= 19 * hits[:, -1:], axis=1)
    return np.take_along_axis(alarms, first[:, None], axis=1)[:, 0] / alarms[:, -1]


def _tpr_at_1_fpr(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    hits, alarms = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    allowed = 100 * alarms <= alarms[:, -1:]
    return np.where(allowed, hits, 0).max(axis=1) / hits[:, -1]
