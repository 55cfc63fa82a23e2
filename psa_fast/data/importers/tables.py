"""CSV tables of public datasets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from psa_fast.data.stand_ins import placeholder
from psa_fast.files import read_text

LONGEST_CELL = 2**24  # characters; csv's own limit is 131072, which a model's answer may exceed


def read_table(path: str | Path, columns: Sequence[str], what: str) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """Yield the line (from 1) and the cells of each row; a cell that the row lacks is empty,
    and those beyond the last column stand under None.

    Args:
        path: the CSV file, UTF-8, with the columns' names in its first line.
        columns: names that must be there.
        what: the table in messages, "FigStep CSV", say.

    Raises:
        ValueError: naming the file and the line, for one that is absent, no CSV, or lacks or repeats a column.
    """
    text = read_text(path, what)
    if stands := placeholder(text[:64].encode()):
        raise ValueError(f"{path}:1: the file is {stands}")
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}:1: no column {', '.join(missing)}; is this a {what}?")
        names = list(reader.fieldnames or ())
        if repeated := [name for name in columns if names.count(name) > 1]:
            raise ValueError(f"{path}:1: the column {repeated[0]} is there twice")
        rows, line = [], reader.line_num + 1
        for row in reader:
            rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: {what} cannot be read: {error}") from None
    finally:
        csv.field_size_limit(limit)
    yield from rows
