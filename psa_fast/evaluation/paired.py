"""Stages compared row by row, and one stage at every threshold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psa_fast.evaluation.metrics import Estimate, rate, undefined, wilson
from psa_fast.evaluation.results import ATTACKED, REFUSED, Result, attacked, by_group, refused, right


def hits(results: Sequence[Result]) -> dict[str, dict[int, bool]]:
    """By guarded metric and place of the row, whether the row counts for the metric; rows not read are left out."""
    names = [*ATTACKED.values(), *REFUSED.values(), "general_accuracy"]
    found: dict[str, dict[int, bool]] = {name: {} for name in names}
    for place, r in enumerate(results):
        if r.group in ATTACKED and (hit := attacked(r)) is not None:
            found[ATTACKED[r.group]][place] = hit
        if r.group in REFUSED and (hit := refused(r)) is not None:
            found[REFUSED[r.group]][place] = hit
        if r.group == "clean" and (hit := right(r)) is not None:
            found["general_accuracy"][place] = hit
    return found


def paired_difference(later: Sequence[bool], earlier: Sequence[bool]) -> Estimate:
    """Share of hits among `later` minus that among `earlier`, over the same rows.

    The interval is Newcombe's for paired proportions (Statistics in Medicine 17, 2635-2650, 1998, method 10): Wilson's
    two intervals joined with the correlation of the pairs. Raises ValueError for unequal numbers of rows.
    """
    if len(later) != len(earlier):
        raise ValueError(f"{len(later)} rows against {len(earlier)}: expected the same rows")
    n = len(later)
    if n == 0:
        return undefined(0, "no rows")
    pairs = Counter(zip(map(bool, later), map(bool, earlier), strict=True))
    both, first, second, neither = (pairs[key] for key in ((True, True), (True, False), (False, True), (False, False)))
    (p, p_low, p_high), (q, q_low, q_high) = (wilson(hits, n) for hits in (both + first, both + second))
    joint = float(both * neither - first * second)
    if joint > 0:
        joint = max(joint - n / 2, 0.0)  # continuity
    spread = math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    phi = joint / spread if spread else 0.0
    down, up = _joined(p - p_low, q_high - q, phi), _joined(p_high - p, q - q_low, phi)
    value = (first - second) / n
    return Estimate(value, value - down, value + up, n)


def _joined(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))


def differences(stages: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, Estimate]]:
    """Every stage against the one before it, and against the first: by "LATER - EARLIER" and guarded metric."""
    names = list(stages)
    pairs = [(names[i], names[j]) for i in range(1, len(names)) for j in dict.fromkeys((i - 1, 0))]
    found = {name: hits(results) for name, results in stages.items()}
    table: dict[str, dict[str, Estimate]] = {}
    for later, earlier in pairs:
        row = table[f"{later} - {earlier}"] = {}
        for metric in found[later]:
            a, b = found[later][metric], found[earlier][metric]
            both = [place for place in a if place in b]
            row[metric] = paired_difference([a[p] for p in both], [b[p] for p in both])
    return table


def flag_scores(results: Sequence[Result]) -> list[float] | None:
    """The score from which on each row is flagged, in the rows' order; None if the file does not tell.

    That is the highest of its readings. A row whose reading is not a number, or that is blocked unread, is flagged at
    every threshold; one that is answered unread at none.
    """
    scores = []
    for r in results:
        if r.highest_score is not None:
            scores.append(r.highest_score)
        elif r.unsafe_score is None:
            scores.append(float("inf") if r.action == "block" else -1.0)
        else:
            return None  # an older version's row
    return scores


def threshold_curve(results: Sequence[Result]) -> dict[str, Any] | None:
    """At every score that occurs: share of risky requests missed, share of harmless ones flagged. None if not known.

    The value is {"threshold", "missed", "flagged"}, lists of one length, thresholds rising, and the numbers of rows,
    {"risky", "harmless"}. All groups of each kind count alike.
    """
    groups = by_group(results)
    kinds = [[r for group in names for r in groups[group]] for names in (ATTACKED, REFUSED)]
    risky, harmless = (flag_scores(rows) for rows in kinds)
    if not risky or not harmless or not any(r.unsafe_score is not None for rows in kinds for r in rows):
        return None
    thresholds = sorted({s for s in (*risky, *harmless) if 0.0 < s <= 1.0})
    below = np.searchsorted(np.sort(risky), thresholds, side="left")
    passed = np.searchsorted(np.sort(harmless), thresholds, side="left")
    return {
        "threshold": thresholds,
        "missed": (below / len(risky)).tolist(),
        "flagged": (1.0 - passed / len(harmless)).tolist(),
        "risky": len(risky),
        "harmless": len(harmless),
    }


def overall(results: Sequence[Result]) -> dict[str, Estimate]:
    """The three numbers of a stage, guarded: attack success, over-refusal, each on all its groups, and ability."""
    found = hits(results)
    return {
        "attack_success": rate([hit for name in ATTACKED.values() for hit in found[name].values()]),
        "over_refusal": rate([hit for name in REFUSED.values() for hit in found[name].values()]),
        "general_accuracy": rate(list(found["general_accuracy"].values())),
    }
