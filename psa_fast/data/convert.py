"""Records of one taxonomy as records of another, by a cross-walk."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from psa_fast.data.problems import DataError, Problem
from psa_fast.data.records import Record, parse_row
from psa_fast.data.rows import read_rows
from psa_fast.files import shown, write_with
from psa_fast.taxonomy.crosswalk import CrossWalk


def convert_record(record: Record, walk: CrossWalk) -> Record:
    """The record with its label in the walk's target.

    `source_label` stays word for word; where the record has none, it becomes taxonomy, type and level of the old label,
    joined by `/`. A type without a counterpart leaves the record without type and level; its group stays.
    """
    kind, level = walk.convert(record.safe_type, record.safe_level)
    old = record.source_label
    if old is None and record.safe_type is not None:
        source = walk.source
        names = [source.name, source.types[record.safe_type]]
        if source.graded and record.safe_level is not None:
            names.append(source.levels[record.safe_level])
        old = "/".join(names)
    return replace(record, safe_type=kind, safe_level=level, source_label=old, taxonomy=walk.target)


def convert_file(path: str | Path, out: str | Path, walk: CrossWalk) -> Counter[tuple[int | None, int | None]]:
    """Write `path`'s records, which are of the walk's source, to `out` as records of its target.

    Images are not looked at. Returns how many records have each pair (type of the source, type of the target).

    Raises:
        ValueError: `out` is `path`, or rows are bad (DataError, which names all of them); nothing is written then.
        OSError: naming the file, if it cannot be written.
    """
    if Path(out).is_file() and Path(path).is_file() and os.path.samefile(path, out):
        raise ValueError(f"--out {shown(out)} is the file that is converted; name another one")
    counts: Counter[tuple[int | None, int | None]] = Counter()
    problems: list[Problem] = []

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for row in read_rows(path):
                if row.error:
                    problems.append(Problem(str(path), row.line, row.error))
                    continue
                found, record = parse_row(row.value, str(path), row.line, (), walk.source)
                problems.extend(found)
                if record is not None and not problems:
                    new = convert_record(record, walk)
                    counts[record.safe_type, new.safe_type] += 1
                    file.write(json.dumps(new.to_row(), ensure_ascii=False) + "\n")
        if problems:
            raise DataError(path, problems)
        if not counts:
            raise ValueError(f"{shown(path)} holds no records")

    write_with(out, write)
    return counts
