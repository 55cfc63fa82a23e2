"""Rows held out for calibration: what the head read of them, and the temperatures and thresholds fitted to it.

The promise of a threshold needs rows that nothing else was fitted to, so a quarter of the rows fits the temperatures
and the other three choose the thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from psa_fast.evaluation.calibration import (
    BATCH_NOISE,
    Threshold,
    class_ece,
    fit_temperature,
    fit_threshold,
    needed_sentence,
    rows_needed,
    scale,
)
from psa_fast.evaluation.evaluate import IMAGE_GROUPS
from psa_fast.evaluation.results import REFUSED
from psa_fast.safety.reading import weigh

if TYPE_CHECKING:
    from psa_fast.data.records import Record
    from psa_fast.safety.policy import Policy
    from psa_fast.safety.reading import Reading

FEWEST_LABELS = 50  # of the rows that a temperature is fitted to


def heads_of(policy: Policy) -> dict[str, slice]:
    """Where the logits of each head stand in a reading's."""
    types = len(policy.taxonomy.types)
    return {"type": slice(0, types), "level": slice(types, None)}


@dataclass(frozen=True)
class HeldOut:
    """A labelled row as the concept head read it.

    Attributes:
        group: of the record.
        labels: what its pictures show, ids by head; None where the row is not about pictures or not labelled.
        logits: float64 [readings, types + levels]; no reading where the head does not read the request.
        decides: the reading that the uncalibrated policy goes by.
        unread: the score of a row without a reading: inf if the policy blocks it, -1 if it is answered.
    """

    group: str
    labels: dict[str, int | None]
    logits: np.ndarray
    decides: int
    unread: float

    @classmethod
    def of(cls, record: Record, readings: Sequence[Reading], policy: Policy) -> HeldOut:
        """The row of a record."""
        shown = record.group in IMAGE_GROUPS and bool(record.images)
        labels = {"type": record.safe_type if shown else None, "level": record.safe_level if shown else None}
        logits = np.array([reading.logits for reading in readings], dtype=np.float64)
        decides = list(readings).index(weigh(policy, readings).reading) if readings else 0
        return cls(record.group, labels, logits, decides, float("inf") if policy.on_error == "block" else -1.0)


def reads_alike(rows: Sequence[HeldOut], others: Sequence[HeldOut]) -> bool:
    """Whether two heads read the same rows the same, but for what another batch does to the digits."""
    return len(rows) == len(others) and all(
        a.logits.shape == b.logits.shape and np.allclose(a.logits, b.logits, rtol=0.0, atol=BATCH_NOISE)
        for a, b in zip(rows, others, strict=True)
    )


@dataclass(frozen=True)
class HeadFit:
    """The temperature of a head, and its calibration error on the rows that it was not fitted to."""

    temperature: float
    before: float
    after: float
    n: int


@dataclass(frozen=True)
class Fit:
    """What was fitted: a temperature for each head, and a threshold for all types or for each (by name)."""

    heads: dict[str, HeadFit]
    thresholds: dict[str, Threshold]
    rows: int

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the type and of the level head."""
        return self.heads["type"].temperature, self.heads["level"].temperature


ALL_TYPES = "all types"


def fit(
    rows: Sequence[HeldOut], policy: Policy, target: float, confidence: float, per_type: bool = False, seed: int = 0
) -> Fit:
    """Fit temperatures and thresholds so that at most a share `target` of harmless requests is flagged.

    With `per_type` every risk type that is on gets a threshold of its own, at which an equal part of `target` may be
    flagged as that type, with an equal part of the doubt: together they keep the promise of `fit_threshold`.

    Args:
        rows: independent draws of the requests that the promise is for.
        policy: its switches and its `on_error` count.
        target: in (0, 1).
        confidence: in (0, 1).
        per_type: see above.
        seed: of the deal of rows into those for temperatures and those for thresholds.

    Raises:
        ValueError: too few rows for the temperatures or the promise, with how many it takes, or a target that no
            threshold keeps.
    """
    types = [name for name in policy.taxonomy.risks if policy.types[name]] if per_type else [ALL_TYPES]
    if not types:
        raise ValueError("the policy switches every risk type off: there is nothing to calibrate")
    part, doubt = target / len(types), 1.0 - (1.0 - confidence) / len(types)
    harmless = [row for row in rows if row.group in REFUSED]
    needed = rows_needed(part, doubt)
    if len(harmless) - len(harmless) // 4 < needed:
        raise ValueError(
            f"{len(harmless)} harmless rows are too few, a quarter of which fits the temperatures: "
            f"{needed_sentence(part, doubt, needed + (needed - 1) // 3)}"
        )
    others = [row for row in rows if row.group not in REFUSED]
    rng = np.random.default_rng(seed)
    for_heads: list[HeldOut] = []
    rest: list[HeldOut] = []
    for kind in (harmless, others):
        order = rng.permutation(len(kind))
        for_heads += [kind[i] for i in order[: len(kind) // 4]]
        rest += [kind[i] for i in order[len(kind) // 4 :]]
    heads = {head: _fit_head(head, place, for_heads, rest) for head, place in heads_of(policy).items()}
    temperatures = heads["type"].temperature, heads["level"].temperature
    chosen = [row for row in rest if row.group in REFUSED]
    scores = [type_scores(row, policy, temperatures) for row in chosen]
    thresholds = {}
    for name in types:
        found = [max(row.values()) if name == ALL_TYPES else row.get(name, -1.0) for row in scores]
        try:
            thresholds[name] = fit_threshold(found, part, doubt)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Fit(heads, thresholds, len(chosen))


def _fit_head(head: str, place: slice, fitted: Sequence[HeldOut], rest: Sequence[HeldOut]) -> HeadFit:
    logits, labels = _labelled(head, place, fitted)
    if len(labels) < FEWEST_LABELS:
        raise ValueError(
            f"{len(labels)} rows with a picture and a {head} label are too few for a temperature: it is fitted to a "
            f"quarter of them and takes {FEWEST_LABELS}, so the data needs about {4 * FEWEST_LABELS}"
        )
    temperature = fit_temperature(logits, labels)
    logits, labels = _labelled(head, place, rest)
    before, after = (class_ece(scale(logits, t), labels) for t in (1.0, temperature))
    return HeadFit(temperature, before, after, len(labels))


def _labelled(head: str, place: slice, rows: Sequence[HeldOut]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [rows, classes] of the deciding readings of the rows with a label, and the labels [rows]."""
    kept = [(row.logits[row.decides, place], row.labels[head]) for row in rows if len(row.logits)]
    known = [(logits, label) for logits, label in kept if label is not None and np.isfinite(logits).all()]
    return np.array([logits for logits, _ in known]), np.array([label for _, label in known], dtype=np.int64)


def type_scores(row: HeldOut, policy: Policy, temperatures: tuple[float, float]) -> dict[str, float]:
    """The highest unsafe score of the readings of a row whose likeliest risk is a type, by the names of such types.

    A row that is flagged whatever the threshold, or never, says so in every type: inf or -1.
    """
    if not len(row.logits):
        return dict.fromkeys(policy.taxonomy.risks, row.unread)
    if not np.isfinite(row.logits).all():
        return dict.fromkeys(policy.taxonomy.risks, float("inf"))
    places = heads_of(policy).values()
    types, levels = (scale(row.logits[:, place], t) for place, t in zip(places, temperatures, strict=True))
    names, harmless = policy.taxonomy.types, policy.taxonomy.harmless
    risky = [i for i in range(len(names)) if i != harmless]
    scores = np.maximum(types[:, risky].sum(1), levels[:, 1:].sum(1))
    enabled = [i for i in risky if policy.types[names[i]]] or risky
    found: dict[str, float] = {}
    for kind, score in zip(types[:, enabled].argmax(1), scores, strict=True):
        name = names[enabled[kind]]
        found[name] = max(found.get(name, -1.0), float(score))
    return found


def flagged(row: HeldOut, policy: Policy) -> bool:
    """Whether a policy flags the row, with its temperatures and thresholds; of switched off types the upper bound."""
    scores = type_scores(row, policy, policy.temperatures)
    return any(score >= policy.threshold(policy.taxonomy.type_id(name)) for name, score in scores.items())
