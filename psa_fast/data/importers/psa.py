"""The official PSA-VLM's published files: training rows, and test files with a question and an answer.

A training row is `{"safe_type", "safe_level", "image", "conversations"}`; its image path is absolute on the machine of
its authors, two images are `a<split>b`, and the `<image>` mark is often left out. A test row is `{"image_path",
"question", "answer", "refused_to_answer", "type"}`. Both come as JSONL or as one JSON list.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from psa_fast.data.importers import SourceRow
from psa_fast.data.records import IMAGE_MARK, SPLIT_MARK
from psa_fast.data.rows import read_rows
from psa_fast.files import shorten
from psa_fast.taxonomy import CLEAN, RISK_TYPES, type_id

HELP = "the official PSA-VLM's training and test files (JSONL or a JSON list)"
NO_MAP = "image path is absolute, and no --map_path fits it"
NO_ANSWER = "the row has no answer, which a record must end with"
TEST_KEYS = {"image_path", "question"}
# what the paper and the red-team sets that it is tested on call the types
OTHER_NAMES = {
    "political": "politics",
    "illegal": "illegal risk",
    "porn": "illegal risk",
    "pornography": "illegal risk",
    "insult": "insults and bullying",
    "insults": "insults and bullying",
    "bullying": "insults and bullying",
    "cyberbullying": "insults and bullying",
    "racial": "fairness",
    "discrimination": "fairness",
    "safe": "clean",
}
# how annotators judge a question -> the level that calls for it
GRADES = {
    "safe to answer": 0,
    "proceed with caution": 1,
    "answer with caution": 1,
    "refuse to answer": 3,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the importer's options."""
    parser.add_argument("--source", required=True, action="append", metavar="FILE", help="may be given several times")
    parser.add_argument(
        "--map_path",
        action="extend",
        nargs="+",
        default=[],
        metavar="OLD=NEW",
        help="image paths that begin with the folder OLD begin with NEW instead; the longest OLD that fits counts",
    )
    parser.add_argument(
        "--image_folder", help="folder that the records' paths are relative to; images are checked there"
    )


def read(args: argparse.Namespace) -> Iterator[SourceRow]:
    """Yield a row for each of the sources'. The source's own label stands in `source_label`, its id too."""
    paths = _Paths(args.map_path, args.image_folder)
    sources = [read_rows(source) for source in args.source]  # an absent file is said before anything is read
    names = _distinct([Path(source).stem for source in args.source])
    for source, name, rows in zip(args.source, names, sources, strict=True):
        for number, (line, value, error) in enumerate(rows, start=1):
            if error is not None:
                yield SourceRow(source, line, error=error)
            elif not isinstance(value, dict):
                yield SourceRow(source, line, error=f"the row is {shorten(value)}; expected an object")
            else:
                convert = _test_row if value.keys() >= TEST_KEYS else _training_row
                try:
                    row = convert(value, paths)
                except _Unreadable as reason:
                    yield SourceRow(source, line, error=str(reason), kind=reason.kind)
                    continue
                yield SourceRow(source, line, row | {"id": f"{name}-{number}", "source": "psa"})


class _Unreadable(ValueError):
    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class _Paths:
    """Rewrites the sources' image paths to paths that are relative to the image folder."""

    def __init__(self, maps: list[str], image_folder: str | None) -> None:
        self.folder = None if image_folder is None else os.path.abspath(image_folder)
        found: dict[PurePosixPath, str] = {}
        for text in maps:
            old, equals, new = text.partition("=")
            if not equals or not old.strip():
                raise ValueError(f"--map_path {shorten(text)}: expected OLD=NEW")
            if found.setdefault(PurePosixPath(old), new) != new:
                raise ValueError(f"--map_path {shorten(old)} was given twice, with different folders")
        self.maps = sorted(found.items(), key=lambda entry: len(entry[0].parts), reverse=True)

    def __call__(self, name: str) -> str:
        path = PurePosixPath(name)
        for old, new in self.maps:
            if path.is_relative_to(old):
                path = PurePosixPath(new) / path.relative_to(old)
                break
        else:
            if path.is_absolute() and not self._inside(path):
                advice = f"--map_path {shorten(str(path.parent))}=FOLDER would"
                raise _Unreadable(
                    f"image path {shorten(name)} is absolute, and no --map_path fits it: {advice}", NO_MAP
                )
        if not path.is_absolute():
            return str(path)
        if not self._inside(path):
            where = "without --image_folder" if self.folder is None else f"outside {shorten(self.folder)}"
            raise _Unreadable(f"--map_path makes {shorten(name)} an absolute path {where}: {shorten(str(path))}")
        return os.path.relpath(path, self.folder)

    def _inside(self, path: PurePosixPath) -> bool:
        return self.folder is not None and path.is_relative_to(self.folder)


def _distinct(names: list[str]) -> list[str]:
    """The names, numbered where one comes again, since a record's id is unique."""
    return [f"{name}{'' if names.index(name) == i else f'-{i + 1}'}" for i, name in enumerate(names)]


def _training_row(row: dict[str, Any], paths: _Paths) -> dict[str, Any]:
    label = {
        key: row[key] for key in ("safe_type", "safe_level", "id", "source", "source_label") if row.get(key) is not None
    }
    image = row.get("image")
    names: Any = image.split(SPLIT_MARK) if isinstance(image, str) else image
    if isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names):
        names = [paths(name.strip()) for name in names]
        image = SPLIT_MARK.join(names) if isinstance(image, str) else names
        row = row | {"image": image, "conversations": _with_marks(row.get("conversations"), len(names))}
    return row | {"source_label": label}


def _with_marks(turns: Any, images: int) -> Any:
    """The turns with one mark per image before the first question if they show none. What is no turn stays."""
    readable = isinstance(turns, list) and all(
        isinstance(t, Mapping) and isinstance(t.get("value"), str) for t in turns
    )
    if not readable or not turns or any(IMAGE_MARK in turn["value"] for turn in turns):
        return turns
    return [{**turns[0], "value": f"{IMAGE_MARK}\n" * images + turns[0]["value"]}, *turns[1:]]


def _test_row(row: dict[str, Any], paths: _Paths) -> dict[str, Any]:
    for key in ("image_path", "question"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise _Unreadable(f"field {key} is {shorten(row[key])}; expected text")
    answer = row.get("answer")
    if answer is None or answer == "":
        raise _Unreadable(NO_ANSWER, NO_ANSWER)
    names = [paths(name.strip()) for name in row["image_path"].split(SPLIT_MARK)]
    turns = [{"from": "user", "value": row["question"]}, {"from": "assistant", "value": answer}]
    ours: dict[str, Any] = {
        "image": SPLIT_MARK.join(names),
        "conversations": _with_marks(turns, len(names)),
        "source_label": {key: row[key] for key in ("type", "refused_to_answer", "id") if key in row},
    }
    kind = _type(row.get("type"))
    level = _level(row.get("refused_to_answer"))
    if kind is None:
        return ours
    if level == 0 and kind != CLEAN:  # asked about a risk, judged harmless: it looks risky and is not
        # judged was the question: its picture may be the type's all the same
        return ours | {"safe_type": CLEAN, "safe_level": 0, "group": "benign_twin", "image_label": "unknown"}
    return ours | {"safe_type": kind, "safe_level": level}


def _type(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        name = " ".join(value.lower().replace("_", " ").replace("-", " ").split())
        value = int(name) if name.isascii() and name.isdigit() and len(name) < 3 else OTHER_NAMES.get(name, name)
    try:
        return type_id(value)
    except ValueError:
        names = ", ".join((*RISK_TYPES, *OTHER_NAMES))
        raise _Unreadable(
            f"type is {shorten(value)}; expected 0 to {CLEAN} or one of: {names}", "unknown type"
        ) from None


def _level(value: Any) -> int | None:
    """The level that the most careful of the annotators' grades calls for; None if nothing was graded."""
    if value is None or value is False or value == []:
        return None  # that an answer is no refusal says nothing of the level
    if value is True:
        return GRADES["refuse to answer"]
    grades = value if isinstance(value, list) else [value]
    levels = [GRADES.get(grade.strip().lower()) if isinstance(grade, str) else None for grade in grades]
    known = [level for level in levels if level is not None]
    if len(known) < len(grades):
        choices = ", ".join(GRADES)
        message = f"refused_to_answer is {shorten(value)}; expected true, false or a list of: {choices}"
        raise _Unreadable(message, "unknown refused_to_answer")
    return max(known)
