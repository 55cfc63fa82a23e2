"""Rows of any importer become a JSONL file: each is checked, the good ones are written as they come."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from psa_fast.data.importers import SourceRow
from psa_fast.data.keys import TEMPLATE
from psa_fast.data.progress import progress
from psa_fast.data.records import Problem, Record, image_fault, parse_row
from psa_fast.files import shorten, shown, write_with
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

BAD_IMAGE = "an image that cannot be used"
CHUNK = 1024  # rows that are held at a time, while their images are looked at


@dataclass
class Import:
    """What became of a source's rows: the numbers of those that were written and the problems of the others."""

    read: int = 0
    written: int = 0
    with_images: int = 0
    from_template: int = 0
    problems: list[Problem] = field(default_factory=list)
    #: reason -> rows that were left out for it; a row counts once
    reasons: Counter[str] = field(default_factory=Counter)
    #: of the records that were written: (safe_type, safe_level, group, number of images) -> how many
    counts: Counter[tuple[int | None, int | None, str, int]] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Count a record that is written."""
        self.written += 1
        self.with_images += bool(record.images)
        self.from_template += TEMPLATE in record.extra
        self.counts[record.safe_type, record.safe_level, record.group, len(record.images)] += 1

    def refuse(self, problems: list[Problem], unusable: bool = False) -> None:
        """Count a row that is left out, for the first of its problems."""
        self.problems += problems
        first = problems[0]
        self.reasons[BAD_IMAGE if unusable else first.kind or first.message] += 1


class _Nothing(Exception):
    """No record is to be written, and the file that was begun must go."""


def import_rows(
    rows: Iterable[SourceRow],
    out: str | Path,
    image_folder: str | Path | None,
    write_partly: bool = True,
    keep_keys: Collection[str] = (),
    taxonomy: Taxonomy = PSA,
) -> Import:
    """Check rows, and write the good ones as JSONL. CHUNK rows are held at a time, beside the ids of all.

    Args:
        rows: what an importer read.
        out: the file to write.
        image_folder: where the images are; None writes the rows without a look at the images.
        write_partly: write the good rows although there are others.
        keep_keys: keys that look like ours and are to be left unread.
        taxonomy: what the labels are of.

    Raises:
        OSError: naming the file, if it cannot be written.
        ValueError: it is one of the sources.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"image folder {str(image_folder)!r} does not exist or is not a folder")
    result = Import()

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            _write(rows, file, out, image_folder, result, keep_keys, taxonomy)
        if not result.written or (result.reasons and not write_partly):
            raise _Nothing

    try:
        write_with(out, write)
    except _Nothing:
        result.written = result.with_images = result.from_template = 0
        result.counts.clear()
    return result


def _write(
    rows: Iterable[SourceRow],
    file: TextIO,
    out: str | Path,
    image_folder: str | Path | None,
    result: Import,
    keep_keys: Collection[str],
    taxonomy: Taxonomy,
) -> None:
    used: dict[str, tuple[str, int]] = {}  # id -> where it was used first
    checked: dict[str, tuple[str, str] | None] = {}  # image -> what is wrong with it
    sources: set[str] = set()
    with progress("importing") as advance, ThreadPoolExecutor(max_workers=8) as pool:
        for chunk in _chunks(rows):
            parsed = [_parse(item, used, keep_keys, taxonomy) for item in chunk]
            if image_folder is not None:
                new = {name for _, one in parsed if one is not None for name in one.images if name not in checked}
                found = pool.map(lambda name: image_fault(name, image_folder), sorted(new))
                checked |= zip(sorted(new), found, strict=True)
            for item, (problems, record) in zip(chunk, parsed, strict=True):
                result.read += 1
                if problems or record is None:
                    result.refuse(problems)
                    continue
                faults = [fault for name in record.images if (fault := checked.get(name))]
                if faults:
                    result.refuse([Problem(item.path, item.line, *fault) for fault in faults], unusable=True)
                    continue
                if item.path not in sources:
                    sources.add(item.path)
                    _keep_source(item.path, out)
                result.add(record)
                file.write(json.dumps(record.to_row(), ensure_ascii=False) + "\n")
            advance(len(chunk))


def _chunks(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def _parse(
    item: SourceRow, used: dict[str, tuple[str, int]], keep_keys: Collection[str], taxonomy: Taxonomy
) -> tuple[list[Problem], Record | None]:
    if item.row is None:
        return [Problem(item.path, item.line, item.error or "", item.kind)], None
    problems, record = parse_row(item.row, item.path, item.line, keep_keys, taxonomy)
    if record is not None and record.id is not None:
        if record.id in used:
            first = "{}:{}".format(*used[record.id])
            problems.append(Problem(item.path, item.line, f"id {shorten(record.id)} was used in {first}"))
        used.setdefault(record.id, (item.path, item.line))
    return problems, record


def _keep_source(source: str, out: str | Path) -> None:
    """Refuse to write over a source, which may be the only copy there is."""
    if Path(out).is_file() and Path(source).is_file() and os.path.samefile(source, out):
        raise ValueError(f"--out {shown(out)} is the file that is imported; name another one")
