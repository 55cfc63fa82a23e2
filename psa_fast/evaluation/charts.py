"""The geometry of the page's charts: numbers of a stage to points in a drawing's own units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psa_fast.evaluation.metrics import Estimate
from psa_fast.evaluation.ranking import BINS, bins
from psa_fast.evaluation.results import Result, taxonomy_of

PLOT_WIDTH, PLOT_HEIGHT = 300, 200
MOST_ODDS = math.log(0.9999 / 0.0001)  # the threshold axis: log-odds from .0001 to .9999
_TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def bar(estimate: Estimate, width: int = PLOT_WIDTH) -> dict[str, Any]:
    """A share as a bar of at most `width`, with the ends of its interval."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return {"text": "n/a", "n": estimate.n, "reason": estimate.reason}
    return {
        "text": percent(estimate),
        "interval": f"{_percent(estimate.low)} to {_percent(estimate.high)}",
        "n": estimate.n,
        "length": round(estimate.value * width, 2),
        "low": round(estimate.low * width, 2),
        "high": round(estimate.high * width, 2),
    }


def percent(estimate: Estimate) -> str:
    """The value of a share in percent, with one digit behind the point."""
    return "n/a" if estimate.value is None else _percent(estimate.value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def threshold_lines(curve: Mapping[str, Any], threshold: float | None) -> dict[str, Any]:
    """Missed and flagged shares over the threshold, in log-odds; the policy's own threshold is marked, if known."""
    at, missed, flagged = (np.asarray(curve[name]) for name in ("threshold", "missed", "flagged"))
    odds = np.linspace(-MOST_ODDS, MOST_ODDS, 241)
    # the shares at a threshold are those at the next score that occurs; beyond the highest one nothing is flagged
    place = np.searchsorted(at, 1.0 / (1.0 + np.exp(-odds)), side="left")
    missed, flagged = np.append(missed, 1.0)[place], np.append(flagged, 0.0)[place]
    return {
        "missed": _line(odds, missed),
        "flagged": _line(odds, flagged),
        "ticks": [(round(_across(math.log(tick / (1 - tick))), 2), f"{tick:g}") for tick in _TICKS],
        "threshold": None if threshold is None else _mark(threshold),
        "risky": curve["risky"],
        "harmless": curve["harmless"],
    }


def _mark(threshold: float) -> tuple[float, str]:
    odds = math.log(threshold / (1.0 - threshold)) if threshold < 1.0 else MOST_ODDS
    return round(_across(min(max(odds, -MOST_ODDS), MOST_ODDS)), 2), f"{threshold:.6g}"


def _across(odds: float) -> float:
    return (odds + MOST_ODDS) / (2 * MOST_ODDS) * PLOT_WIDTH


def _line(odds: np.ndarray, shares: np.ndarray) -> str:
    points = zip((odds + MOST_ODDS) / (2 * MOST_ODDS) * PLOT_WIDTH, (1.0 - shares) * PLOT_HEIGHT, strict=True)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def reliability_points(unsafe: Sequence[bool], probabilities: Sequence[float]) -> list[dict[str, Any]]:
    """A point for each bin that has rows: mean score across, share of unsafe rows up, and its number of rows."""
    score, label = np.asarray(probabilities), np.asarray(unsafe, dtype=np.float64)
    place = bins(score)
    points = []
    for number in range(BINS):
        chosen = place == number
        if count := int(chosen.sum()):
            mean, share = float(score[chosen].mean()), float(label[chosen].mean())
            points.append(
                {
                    "x": round(mean * PLOT_WIDTH, 2),
                    "y": round((1.0 - share) * PLOT_HEIGHT, 2),
                    "r": round(3.0 + 6.0 * math.sqrt(count / len(score)), 2),
                    "text": f"mean score {mean:.3f}, {share:.3f} of {count} rows are unsafe",
                }
            )
    return points


def confusion(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows of the type confusion matrix: the label, and for each type read how many rows and which share of the row."""
    names = taxonomy_of(results).types
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    for r in results:
        if r.safe_type is not None and r.read_type is not None:
            table[r.safe_type, r.read_type] += 1
    return [
        {"name": name, "cells": [(int(count), round(count / row.sum(), 3)) for count in row]}
        for name, row in zip(names, table, strict=True)
        if row.sum()
    ]
