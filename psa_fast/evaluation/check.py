"""All that can be wrong with the records of an evaluation, found before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast.data.records import DataError, Problem, Record
from psa_fast.files import unwritable_text

if TYPE_CHECKING:
    from psa_fast.safety.policy import Policy
    from psa_fast.safety.request import Prompter


def require_labels(path: str | Path, records: Sequence[Record]) -> list[Record]:
    """Return the records without a group, which no safety metric can count.

    Raises ValueError if none has one: a report on them would say nothing, and look as if it did.
    """
    unlabelled = [record for record in records if not record.group]
    if len(unlabelled) == len(records):
        raise ValueError(
            f"{path}: none of its {len(records)} rows has a label (safe_type and safe_level, or a group), "
            "so nothing about safety can be measured"
        )
    return unlabelled


def longest_hint(policy: Policy) -> str | None:
    """The longest hint that a policy may put before a request; None if it gives none."""
    hints = [policy.hint(kind, level) for kind in policy.taxonomy.risks for level in policy.taxonomy.levels[1:]]
    return max((hint for hint in hints if hint), key=len, default=None)


def check_prompts(
    path: str | Path, records: Sequence[Record], prompter: Prompter, max_new_tokens: int, hint: str | None = None
) -> None:
    """Make every prompt, with the hint if there is one, as a stage will.

    Raises DataError, which names every row whose request cannot be asked, or whose texts cannot be written down.
    """
    from psa_fast.safety.request import check_turns

    problems = []
    for record in records:
        try:
            if wrong := unwritable_text(record.to_row()):
                raise ValueError(f"{wrong}, which is no text")
            turns = check_turns(record.turns[:-1], len(record.images))
            prompter.prompt(turns, None, max_new_tokens, hint)
        except ValueError as error:
            problems.append(Problem(record.path or str(path), record.line, str(error)))
    if problems:
        raise DataError(path, problems)
