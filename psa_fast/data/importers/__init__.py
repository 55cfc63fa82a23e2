"""Importers: one module per public dataset, which turns it into our rows and keeps the source's own label verbatim.

What `psa-fast data import NAME` needs of a module NAME:
- `HELP`, what it reads;
- `add_arguments(parser)`, its options, `--image_folder` among them;
- `read(args)`, which yields a `SourceRow` for every row of the source, in order. It raises ValueError only for what
  spoils the whole source: a file that is absent, a column that is missing.

Everything else, from the checks to the report, is `import_rows` and the same for all.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from psa_fast.data.progress import progress
from psa_fast.data.records import Problem, Record, image_faults, parse_row
from psa_fast.files import shorten, shown, write_text

BAD_IMAGE = "an image that cannot be used"


class SourceRow(NamedTuple):
    """A row of the source as a row of ours, or the reason why there is none.

    `kind` is the part of the reason that many rows may share, as in Problem.
    """

    path: str
    line: int
    row: dict[str, Any] | None = None
    error: str | None = None
    kind: str = ""


@dataclass
class Import:
    """What became of a source's rows: the records that were written and the problems of the others."""

    read: int = 0
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    #: reason -> rows that were left out for it; a row counts once
    reasons: Counter[str] = field(default_factory=Counter)


def import_rows(
    rows: Iterable[SourceRow], out: str | Path, image_folder: str | Path | None, write_partly: bool = True
) -> Import:
    """Check rows, and write the good ones as JSONL.

    Args:
        rows: what an importer read.
        out: the file to write.
        image_folder: where the images are; None writes the rows without a look at the images.
        write_partly: write the good rows although there are others.

    Raises:
        OSError: naming the file, if it cannot be written.
        ValueError: it is one of the sources.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"image folder {str(image_folder)!r} does not exist or is not a folder")
    result = Import()
    parsed: list[tuple[int, Record]] = []
    found: list[tuple[int, Problem]] = []
    first_with: dict[str, Record] = {}
    with progress("importing") as advance:
        for number, item in enumerate(rows, start=1):
            advance(1)
            result.read = number
            if item.row is None:
                found.append((number, Problem(item.path, item.line, item.error or "", item.kind)))
                continue
            problems, record = parse_row(item.row, item.path, item.line)
            if record is not None and record.id is not None:
                first = first_with.setdefault(record.id, record)
                if first is not record:
                    problems.append(Problem(item.path, item.line, f"id {shorten(record.id)} was used in {first.where}"))
            found += [(number, problem) for problem in problems]
            if record is not None and not problems:
                parsed.append((number, record))
    faults = {}
    if image_folder is not None:
        faults = image_faults({name for _, record in parsed for name in record.images}, image_folder)
    for number, record in parsed:
        wrong = [Problem(record.path, record.line, *faults[name]) for name in record.images if name in faults]
        found += [(number, problem) for problem in wrong]
        if not wrong:
            result.records.append(record)
    found.sort(key=lambda entry: entry[0])
    result.problems = [problem for _, problem in found]
    first_of_row: dict[int, Problem] = {}
    for number, problem in found:
        first_of_row.setdefault(number, problem)
    unusable = {message for message, _ in faults.values()}
    result.reasons = Counter(
        BAD_IMAGE if problem.message in unusable else problem.kind or problem.message
        for problem in first_of_row.values()
    )
    if result.records and (write_partly or not found):
        _keep_sources({record.path for record in result.records}, out)
        lines = [json.dumps(record.to_row(), ensure_ascii=False) + "\n" for record in result.records]
        write_text(out, "".join(lines))
    else:
        result.records = []
    return result


def _keep_sources(sources: Iterable[str], out: str | Path) -> None:
    """Refuse to write over a source, which may be the only copy there is."""
    for source in sources:
        if Path(out).is_file() and Path(source).is_file() and os.path.samefile(source, out):
            raise ValueError(f"--out {shown(out)} is the file that is imported; name another one")
