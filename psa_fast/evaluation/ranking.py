"""How well a score tells unsafe rows from safe ones, as a ranking and as a probability, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from psa_fast.evaluation.metrics import BOOTSTRAP_SAMPLES, Estimate, percentiles, undefined

BOOTSTRAP_CHUNK = 4_000_000  # resampled weights held at once
BINS = 10  # of ECE and of the reliability diagram: equal widths, each with its lower end
# unsafe and safe rows at each distinct score, from the highest one down, [samples, scores] each -> [samples]
Ranking = Callable[[np.ndarray, np.ndarray], np.ndarray]


def auroc(unsafe: Sequence[bool], scores: Sequence[float], seed: int = 0) -> Estimate:
    """Area under the ROC curve: P(score of an unsafe row > score of a safe one), ties counted half.

    Undefined if only one of the two kinds occurs. Raises ValueError for a score that is not finite.
    """
    return _ranked(unsafe, scores, {"auroc": _area}, seed)["auroc"]


def ranking(unsafe: Sequence[bool], scores: Sequence[float], seed: int = 0) -> dict[str, Estimate]:
    """How well the scores rank, all on the same resamples of rows.

    Returns:
        auroc: as `auroc`.
        auprc: average precision: the precision at every distinct score, weighted by the recall that it adds.
        fpr_at_95_tpr: share of safe rows flagged at the highest threshold that flags 95% of the unsafe ones.
        tpr_at_1_fpr: share of unsafe rows flagged at the lowest threshold that flags at most 1% of the safe ones.

    Undefined and raising as `auroc`.
    """
    return _ranked(unsafe, scores, _RANKINGS, seed)


def reliability(unsafe: Sequence[bool], probabilities: Sequence[float], seed: int = 0) -> dict[str, Estimate]:
    """How far the probabilities are from what was the case, both on the same resamples of rows.

    Returns:
        ece: expected calibration error in BINS bins: the mean over rows of |mean probability - share of unsafe| of
            their bin. It is never below 0, so the interval of a well calibrated score lies above its true error.
        brier: mean squared distance of probability and label.

    Raises ValueError for a probability that is not in [0, 1].
    """
    label, score = _checked(unsafe, probabilities)
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError("a probability is not in [0, 1]")
    squares = (score - label) ** 2
    gaps = np.zeros((label.size, BINS))
    gaps[np.arange(label.size), bins(score)] = score - label

    def values(weights: np.ndarray) -> np.ndarray:
        return np.stack([np.abs(weights @ gaps).sum(1), weights @ squares], axis=1) / label.size

    return _resampled(label.size, values, ("ece", "brier"), seed)


def bins(probabilities: np.ndarray) -> np.ndarray:
    """The bin, 0 to BINS - 1, of each probability."""
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


def _checked(unsafe: Sequence[bool], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    label, score = np.asarray(unsafe, dtype=bool), np.asarray(scores, dtype=np.float64)
    if label.shape != score.shape:
        raise ValueError(f"{label.size} labels and {score.size} scores")
    if not np.isfinite(score).all():
        raise ValueError("a score is not finite")
    return label, score


def _ranked(
    unsafe: Sequence[bool], scores: Sequence[float], rankings: Mapping[str, Ranking], seed: int
) -> dict[str, Estimate]:
    label, score = _checked(unsafe, scores)
    n = label.size
    if label.all() or not label.any():
        reason = "no rows" if n == 0 else "only one of unsafe and safe occurs"
        return dict.fromkeys(rankings, undefined(n, reason))
    order = np.argsort(-score, kind="stable")
    label, score = label[order], score[order]
    starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # first row of each run of equal scores

    def values(weights: np.ndarray) -> np.ndarray:
        positive = np.add.reduceat(weights * label, starts, axis=1)
        negative = np.add.reduceat(weights * ~label, starts, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.stack([ranking(positive, negative) for ranking in rankings.values()], axis=1)
        # a resample of one kind only has no ranking
        found[(positive.sum(1) == 0) | (negative.sum(1) == 0)] = np.nan
        return found

    return _resampled(n, values, tuple(rankings), seed)


def _resampled(
    n: int, values: Callable[[np.ndarray], np.ndarray], names: Sequence[str], seed: int
) -> dict[str, Estimate]:
    """`values` of the rows and of their resamples.

    It takes weights [samples, n], how often each row was drawn, and gives [samples, names].
    """
    if n == 0:
        return dict.fromkeys(names, undefined(0, "no rows"))
    rng = np.random.default_rng(seed)
    samples = []
    left = BOOTSTRAP_SAMPLES
    while left:
        size = max(1, min(left, BOOTSTRAP_CHUNK // n))
        samples.append(values(rng.multinomial(n, np.full(n, 1.0 / n), size=size).astype(np.float64)))
        left -= size
    (exact,), drawn = values(np.ones((1, n))), np.concatenate(samples)
    return {name: percentiles(float(exact[i]), drawn[:, i], n) for i, name in enumerate(names)}


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


_RANKINGS: dict[str, Ranking] = {
    "auroc": _area,
    "auprc": _average_precision,
    "fpr_at_95_tpr": _fpr_at_95_tpr,
    "tpr_at_1_fpr": _tpr_at_1_fpr,
}
