"""Decides the rows of an audit log again, under the same policy or another; no model is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psa_fast.data.rows import read_rows
from psa_fast.files import shorten
from psa_fast.safety.intervention import Intervention
from psa_fast.safety.policy import Policy
from psa_fast.safety.reading import Reading
from psa_fast.safety.redecide import redecide
from psa_fast.safety.verdict import Verdict
from psa_fast.serve.audit_log import VERSION
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy, require_same


def read_log(path: str | Path, taxonomy: Taxonomy = PSA) -> Iterator[tuple[int, Verdict]]:
    """The verdicts of an audit log that were applied, with their lines; a shadow policy's are passed by.

    Raises ValueError, naming file and line, for what is no row of one.
    """
    for row in read_rows(path):
        try:
            if row.error:
                raise ValueError(row.error)
            if not isinstance(row.value, dict) or row.value.get("version") != VERSION:
                raise ValueError(f"no row of an audit log of version {VERSION}")
            if not row.value["shadow"]:
                yield row.line, _verdict(row.value, taxonomy)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}:{row.line}: no row of an audit log ({shorten(str(error))})") from None
        except ValueError as error:
            raise ValueError(f"{path}:{row.line}: {error}") from None


def _verdict(row: dict[str, Any], taxonomy: Taxonomy) -> Verdict:
    readings = []
    for one in row["readings"]:
        span = None if one["span"] is None else tuple(one["span"])
        # the probabilities are those of the policy that decides, made of the logits
        readings.append(
            Reading(
                one["query"],
                [],
                [],
                one["picture"],
                one["number"],
                span,
                _logits(one["logits"], taxonomy),
                one["words_alone"],
            )
        )
    # rows of older versions know of none
    by_hand = None if row.get("intervention") is None else Intervention.from_json(row["intervention"])
    names = ("checked", "applied", "unsafe", "action", "type", "level", "unsafe_score", "code")
    kept = {name: row[name] for name in names}
    return Verdict(
        rule=row["rule"] or "",
        policy_hash=row["policy"],
        model_hash=row["model"],
        intervention=by_hand,
        readings=tuple(readings),
        **kept,
    )


def _logits(values: Any, taxonomy: Taxonomy) -> list[float]:
    wanted = len(taxonomy.types) + len(taxonomy.levels)
    if not isinstance(values, list) or len(values) != wanted:
        raise ValueError(f"a reading has {shorten(values)} in the place of {wanted} logits")
    return [math.nan if value is None else float(value) for value in values]


@dataclass
class Comparison:
    """How the rows of a log were and would be decided.

    Attributes:
        rows: of the log.
        same: those whose action, type and level stay.
        changes: how often an action became another, or stayed with another type or level, by both their names.
        lines: of the rows that change.
    """

    rows: int = 0
    same: int = 0
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    lines: list[int] = field(default_factory=list)

    def add(self, line: int, before: Verdict, after: Verdict) -> None:
        """Count a row."""
        self.rows += 1
        if _outcome(before) == _outcome(after):
            self.same += 1
        else:
            self.changes[before.action, after.action] += 1
            self.lines.append(line)


def _outcome(verdict: Verdict) -> tuple[Any, ...]:
    return verdict.action, verdict.type, verdict.level, verdict.unsafe, verdict.code


def replay(path: str | Path, policy: Policy) -> Comparison:
    """Decide the rows of a log again under the policy that they were decided under, and compare.

    Raises ValueError for a row of another policy, and as `read_log`.
    """
    found = Comparison()
    for line, verdict in read_log(path, policy.taxonomy):
        if verdict.policy_hash != policy.hash:
            told = f"decided by policy {str(verdict.policy_hash)[:12]}, not {policy.hash[:12]}"
            raise ValueError(f"{path}:{line}: {told}; give that one, or compare two with `psa-fast policy diff`")
        found.add(line, verdict, redecide(policy, verdict))
    return found


def difference(path: str | Path, old: Policy, new: Policy) -> Comparison:
    """Decide the rows of a log under two policies, and compare. Raises ValueError as `read_log`.

    Rows that an operator intervened on are passed by: what was forced says nothing of a policy.
    """
    found = Comparison()
    require_same(old.taxonomy, new.taxonomy, "the old policy", "the new one")
    for line, verdict in read_log(path, old.taxonomy):
        if verdict.intervention is not None:
            continue
        found.add(line, redecide(old, verdict), redecide(new, verdict))
    return found
