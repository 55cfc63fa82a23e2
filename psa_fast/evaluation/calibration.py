"""A threshold that keeps its promise on harmless requests, and a temperature that makes probabilities honest.

The flags grow as the threshold falls, so testing thresholds from the highest down until the first that fails is taking
the lowest one whose number of flags is small enough, and that keeps the confidence of a single test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# a request read in another batch moves by this much at most, in log-odds (as evaluate's scores are rounded)
BATCH_NOISE = 1e-4
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True)
class Threshold:
    """A threshold that flags `flagged` of `n` harmless rows: with the confidence at most a share of `bound`."""

    value: float
    flagged: int
    n: int
    bound: float


def binomial_cdf(most: int, n: int, p: float) -> float:
    """P(at most `most` of `n` draws hit), each with probability 0 < p < 1."""
    if most >= n:
        return 1.0
    log_p, log_q = math.log(p), math.log1p(-p)
    whole = math.lgamma(n + 1)
    terms = [whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q for k in range(most + 1)]
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def upper_bound(hits: int, n: int, confidence: float) -> float:
    """One-sided Clopper-Pearson bound of a share of which `hits` of `n` rows are seen."""
    if hits >= n:
        return 1.0
    low, high = hits / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if binomial_cdf(hits, n, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def rows_needed(target: float, confidence: float) -> int:
    """The fewest rows that can promise a share of at most `target`: so many, with none of them flagged."""
    return math.ceil(math.log(1.0 - confidence) / math.log1p(-target) - 1e-9)


def most_flags(n: int, target: float, confidence: float) -> int:
    """The most of `n` rows that may be flagged so that the bound is at most `target`; -1 if even none is too many."""
    low, high = -1, n  # the bound of `low` holds, that of `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(middle, n, target) <= 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low


def fit_threshold(harmless: Sequence[float], target: float, confidence: float = 0.95) -> Threshold:
    """The lowest threshold that flags at most a share `target` of harmless requests, with the confidence.

    The guarantee holds for any number of rows and any distribution of scores, if the rows are drawn independently from
    the requests that it is wanted for, and nothing else was fitted to them: the chance, over the draw of the rows, that
    the threshold flags more than `target` of such requests is at most 1 - `confidence`. Its source is the fixed
    sequence testing of Learn then Test (Angelopoulos et al., arXiv 2110.01052), with the exact binomial bound of
    Clopper and Pearson (Biometrika 26, 404-413, 1934) as the p-value.

    Args:
        harmless: the score from which on each row is flagged; inf for a row that always is, -1 for one that never is.
        target: in (0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: too few rows, with how many it takes; or more than may be are flagged at every threshold up to 1.
    """
    n = len(harmless)
    allowed = most_flags(n, target, confidence) if n else -1
    if allowed < 0:
        needed = rows_needed(target, confidence)
        raise ValueError(f"{n} harmless rows are too few: {needed_sentence(target, confidence, needed)}")
    first_not_flagged = sorted(harmless, reverse=True)[allowed]
    value = _above(first_not_flagged)
    if value > 1.0:
        always = sum(score >= 1.0 for score in harmless)
        raise ValueError(
            f"no threshold up to 1 flags as few as {allowed} of {n} harmless rows: "
            f"{always} have a score of 1 or cannot be read"
        )
    flagged = sum(score >= value for score in harmless)
    return Threshold(value, flagged, n, upper_bound(flagged, n, confidence))


def needed_sentence(target: float, confidence: float, rows: int) -> str:
    """How many rows a promise takes, as a part of a sentence."""
    return (
        f"to promise at most {target:.6g} with {confidence:.6g} confidence takes {rows}, if none of them is flagged, "
        "and more if some are"
    )


def _above(score: float) -> float:
    """The threshold that a score stays below in whatever batch it is read."""
    after = math.nextafter(max(score, 0.0), math.inf)
    if not 0.0 < score < 1.0:
        return after
    odds = math.log(score) - math.log1p(-score) + BATCH_NOISE
    # of a score close to 1 the step is lost in the rounding
    return max(after, 1.0 / (1.0 + math.exp(-odds)))


def scale(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) over the last axis, float64."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which the labels are likeliest (Guo et al., arXiv 1706.04599).

    Args:
        logits: [rows, classes].
        labels: [rows] int64.

    Returns it within MIN_TEMPERATURE and MAX_TEMPERATURE, at whose ends it stays where the best lies beyond.
    """
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        highest = scaled.max(axis=1)
        return float((highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1)) - scaled[rows, labels]).mean())

    # the loss has one minimum, since it is convex in 1/T
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def class_ece(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the likeliest class: its probability against how often it is right.

    Args:
        probs: [rows, classes] float64.
        labels: [rows] int64.
        bins: of equal width.
    """
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
