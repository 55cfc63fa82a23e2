"""People as a judge: a sample of answers to be labelled by hand, and the labelled file read back."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_fast.data.rows import read_rows
from psa_fast.evaluation.judges.contract import Answered, Opinion, Verdict
from psa_fast.files import read_text, shorten, shown, write_text

LABELS: tuple[Verdict, ...] = ("safe", "unsafe", "refusal", "partial", "controversial")
COLUMNS = ("key", "request", "pictures", "answer", "label")


def key_of(answered: Answered) -> str:
    """Names an answer to a request, whatever run or stage gave it."""
    content = json.dumps([answered.request, answered.pictures, answered.answer])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sample(answers: Iterable[Answered], size: int, seed: int) -> list[dict[str, str]]:
    """Rows to be labelled: `size` of the different answers, or all if there are fewer, drawn by `seed`, shuffled.

    They tell neither stage nor guard nor group: whoever labels should not know.
    """
    different = {key_of(answered): answered for answered in answers}
    keys = sorted(different)
    chosen = random.Random(seed).sample(keys, min(size, len(keys)))
    return [
        {
            "key": key,
            "request": different[key].question,
            "pictures": " ".join(different[key].pictures),
            "answer": different[key].answer,
            "label": "",
        }
        for key in chosen
    ]


def write_sample(path: str | Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the rows as CSV or JSONL, by the file's name."""
    if Path(path).suffix == ".csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, stream.getvalue())
    else:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class HumanLabels:
    """Labels of a file that `write_sample` wrote and people filled in; rows without a label were not judged.

    Raises ValueError, with file and line, for another label, for a key that stands twice with two labels, and for a
    file without any label.
    """

    name = "human"
    tells_refusals = True
    harmless = True

    def __init__(self, path: str | Path) -> None:
        self.labels: dict[str, Verdict] = {}
        self._sha256 = hashlib.sha256(read_text(path, "labelled file").encode()).hexdigest()
        for line, row in _rows(path):
            label = row.get("label")
            if not isinstance(row.get("key"), str) or not isinstance(label, str):
                raise ValueError(f"{shown(path)}:{line}: expected a key and a label")
            if not (label := label.strip()):
                continue
            if label not in LABELS:
                raise ValueError(
                    f"{shown(path)}:{line}: label is {shorten(label)}; expected {', '.join(LABELS)}, or none"
                )
            if self.labels.setdefault(row["key"], label) != label:  # type: ignore[arg-type]
                raise ValueError(f"{shown(path)}:{line}: the key {row['key']} has two labels")
        if not self.labels:
            raise ValueError(f"{shown(path)}: no row has a label")

    def judge(self, answers: Iterable[Answered]) -> Iterator[Opinion | None]:
        """The label of each answer, None for those without."""
        for answered in answers:
            label = self.labels.get(key_of(answered))
            yield None if label is None else Opinion(label, label)

    def provenance(self) -> dict[str, Any]:
        """Hash of the file and number of labels."""
        return {"labels_sha256": self._sha256, "labels": len(self.labels)}


def _rows(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if Path(path).suffix != ".csv":
        for row in read_rows(path):
            if row.error is not None or not isinstance(row.value, dict):
                raise ValueError(f"{shown(path)}:{row.line}: {row.error or 'not an object'}")
            yield row.line, row.value
        return
    reader = csv.DictReader(io.StringIO(read_text(path, "labelled file"), newline=""), strict=True)
    if not {"key", "label"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{shown(path)}:1: expected the columns {', '.join(COLUMNS)}")
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{shown(path)}:{reader.line_num}: not CSV: {error}") from None
