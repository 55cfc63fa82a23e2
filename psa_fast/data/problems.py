"""What is wrong with rows of a data file, listed for people: a few of each kind, the rest as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MAX_LISTED = 100
MAX_OF_A_KIND = 3  # what is wrong with one row in this way is wrong with most


class Problem(NamedTuple):
    """What is wrong with one row. `kind` is the part of the message that other rows of the file are likely to share."""

    path: str
    line: int
    message: str
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


class DataError(ValueError):
    """Bad rows; `problems` holds all of them, the message the first MAX_LISTED."""

    def __init__(self, path: str | Path, problems: Sequence[Problem]):
        self.problems = list(problems)
        listed = list_problems(problems, MAX_LISTED)
        super().__init__(
            "\n".join([f"{len(problems)} problem(s) in {str(path)!r}:", *(f"  {line}" for line in listed)])
        )


def list_problems(problems: Sequence[Problem], limit: int | None = None) -> list[str]:
    """Return lines that show the problems in their order: MAX_OF_A_KIND of each kind, `limit` in all, and the rest
    as numbers."""
    lines: list[str] = []
    alike: Counter[tuple[str, str]] = Counter()
    left_out = 0
    for problem in problems:
        alike[problem.path, problem.kind] += 1
        if problem.kind and alike[problem.path, problem.kind] > MAX_OF_A_KIND:
            continue
        if limit is not None and len(lines) >= limit:
            left_out += 1
            continue
        lines.append(str(problem))
    for (path, kind), count in alike.items():
        if kind and count > MAX_OF_A_KIND:
            lines.append(f"... and {count - MAX_OF_A_KIND} more in {path}: {kind}")
    if left_out:
        lines.append(f"... and {left_out} more; `psa-fast data check` lists all of them")
    return lines
