"""Numbers with their 95% interval: Wilson for rates, a seeded percentile bootstrap over rows for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A metric on `n` rows with its 95% interval; all three numbers are None, and `reason` says why, if undefined."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None

    def to_json(self) -> dict[str, float | int | str | None]:
        """The mapping of report.json: value, low, high, n, and reason for an undefined metric only."""
        fields: dict[str, float | int | str | None] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
        }
        return fields if self.reason is None else {**fields, "reason": self.reason}


def undefined(n: int, reason: str) -> Estimate:
    """A metric that has no value on these rows."""
    return Estimate(None, None, None, n, reason)


def rate(hits: Sequence[bool]) -> Estimate:
    """Share of true entries with the Wilson score interval."""
    n = len(hits)
    if n == 0:
        return undefined(0, "no rows")
    return Estimate(*wilson(sum(map(bool, hits)), n), n)


def wilson(hits: int, n: int) -> tuple[float, float, float]:
    """A share of `n` >= 1 rows with the ends of its Wilson score interval."""
    p = hits / n
    spread = 1.0 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / spread
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / spread
    # at p = 0 and 1 the exact bound is p itself; rounding would miss it by one digit
    return p, 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> Estimate:
    """Share of equal entries, with the Wilson interval."""
    return rate([t == p for t, p in zip(targets, predictions, strict=True)])


def macro_f1(targets: Sequence[int], predictions: Sequence[int], classes: int, seed: int = 0) -> Estimate:
    """Unweighted mean of the F1 of every class that occurs among targets or predictions."""
    return _from_confusion(targets, predictions, classes, _macro_f1, seed, "no rows")


def quadratic_kappa(targets: Sequence[int], predictions: Sequence[int], classes: int, seed: int = 0) -> Estimate:
    """Cohen's kappa with quadratic weights over ordinal classes 0..classes-1; undefined if all is one class."""
    reason = "targets and predictions are all of one class"
    return _from_confusion(targets, predictions, classes, _quadratic_kappa, seed, reason)


def cohen_kappa(first: Sequence[int], second: Sequence[int], classes: int, seed: int = 0) -> Estimate:
    """Cohen's kappa of two raters over classes without order; undefined if all is one class."""
    return _from_confusion(first, second, classes, _plain_kappa, seed, "both say one and the same class of every row")


def _from_confusion(
    targets: Sequence[int],
    predictions: Sequence[int],
    classes: int,
    metric: Callable[[np.ndarray], np.ndarray],
    seed: int,
    reason: str,
) -> Estimate:
    target, prediction = np.asarray(targets, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    if target.shape != prediction.shape:
        raise ValueError(f"{target.size} targets and {prediction.size} predictions")
    n = target.size
    if n == 0:
        return undefined(0, "no rows")
    if min(target.min(), prediction.min()) < 0 or max(target.max(), prediction.max()) >= classes:
        raise ValueError(f"a class id is outside 0..{classes - 1}")
    cells = np.bincount(target * classes + prediction, minlength=classes * classes)
    value = float(metric(cells.reshape(1, classes, classes).astype(np.float64))[0])
    if math.isnan(value):
        return undefined(n, reason)
    # drawing n rows with replacement is drawing the confusion matrix from a multinomial
    draws = np.random.default_rng(seed).multinomial(n, cells / n, size=BOOTSTRAP_SAMPLES).astype(np.float64)
    return percentiles(value, metric(draws.reshape(-1, classes, classes)), n)


def _macro_f1(confusion: np.ndarray) -> np.ndarray:  # [samples, target, prediction] -> [samples]
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    size = confusion.sum(1) + confusion.sum(2)  # 2 hits + misses + false alarms
    f1 = np.divide(2 * hits, size, out=np.full_like(size, np.nan), where=size > 0)
    return np.nanmean(f1, axis=1)


def _quadratic_kappa(confusion: np.ndarray) -> np.ndarray:
    classes = confusion.shape[1]
    return _kappa(confusion, np.subtract.outer(np.arange(classes), np.arange(classes)).astype(np.float64) ** 2)


def _plain_kappa(confusion: np.ndarray) -> np.ndarray:
    return _kappa(confusion, 1.0 - np.eye(confusion.shape[1]))


def _kappa(confusion: np.ndarray, weights: np.ndarray) -> np.ndarray:  # [samples, c, c], [c, c] cost -> [samples]
    observed = (confusion * weights).sum((1, 2)) * confusion.sum((1, 2))
    by_chance = np.einsum("bi,bj,ij->b", confusion.sum(2), confusion.sum(1), weights)
    return 1.0 - np.divide(observed, by_chance, out=np.full_like(observed, np.nan), where=by_chance > 0)


def percentiles(value: float, samples: np.ndarray, n: int) -> Estimate:
    """A value on `n` rows with the interval of its bootstrap samples [samples]."""
    # a resample without one of the classes has no value; it says nothing about the interval
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)
