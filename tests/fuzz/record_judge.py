"""The one judgement that all spoilt data files get.

`judge(path, image_folder)` says how `read_records` takes a file. It reads the file on its own, with Python's json, and
compares.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limits import TooLongError, limit, no_sentence

TYPES = ("politics", "illegal risk", "insults and bullying", "fairness", "privacy", "misleading", "clean")
LEVELS = ("none", "low", "medium", "high")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FIELDS = ("image", "safe_type", "safe_level", "conversations", "id", "source", "source_label", "split", "group")


class _Twice(dict):
    """An object in which a key stood twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Twice(found)


def lenient(data: bytes) -> tuple[list[tuple[int, Any]], bool]:
    """Rows as Python's json reads them, with their lines, and whether all of the file could be read so."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    found: list[tuple[int, Any]] = []
    whole = True
    if data.lstrip().startswith(b"["):
        try:
            value = json.loads(data.decode(), object_pairs_hook=_pairs)
        except (ValueError, RecursionError):
            return [], False
        return [(0, row) for row in value], True
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line.decode(), object_pairs_hook=_pairs)))
        except (ValueError, RecursionError):
            whole = False
    return found, whole


def _flat(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        item = pending.pop()
        yield item
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item


def _label(value: Any, names: tuple[str, ...]) -> int | None:
    """The id a label means; ValueError for one that means nothing."""
    if value is None:
        return None
    if isinstance(value, str):
        return names.index(value.strip().lower())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    raise ValueError(value)


def _squeezed(key: str) -> str:
    """A key as the eye reads it: without marks that are not seen, blanks, underscores, hyphens and capitals."""
    seen = (c for c in unicodedata.normalize("NFKC", key).lower() if unicodedata.category(c) not in ("Cf", "Cc"))
    return "".join(c for c in seen if not c.isspace() and c not in "_-")


def difference(record: Any, row: Any, image_folder: Path) -> str | None:
    """What a record says otherwise than its row, None if it says the same."""
    if not isinstance(row, dict):
        return "a record from what is no object"
    for item in _flat(row):
        if isinstance(item, _Twice):
            return "a key stands twice"
        if isinstance(item, str) and any(0xD800 <= ord(c) < 0xE000 for c in item):
            return "text that is none"
    try:
        if record.safe_type != _label(row.get("safe_type"), TYPES):
            return f"safe_type {record.safe_type} from {row.get('safe_type')!a}"
        if record.safe_level != _label(row.get("safe_level"), LEVELS):
            return f"safe_level {record.safe_level} from {row.get('safe_level')!a}"
        turns = [(ROLES[turn["from"].strip().lower()], turn["value"]) for turn in row["conversations"]]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        return f"a record from a row that means none ({error!r})"
    image = row.get("image")
    images = [] if image is None else image if isinstance(image, list) else image.split("<split>")
    got = [(turn.role, turn.text) for turn in record.turns]
    if isinstance(image, str) and "<split>" in image:
        images = [name.strip() for name in images]
        if sum(text.count("<image>") for _, text in turns) == 1:
            turns = [(role, text.replace("<image>", "<image>\n<image>")) for role, text in turns]
    if got != turns:
        return f"turns {got!a:.200} from {turns!a:.200}"
    if list(record.images) != images:
        return f"images {record.images} from {image!a:.80}"
    if sum(text.count("<image>") for _, text in got) != len(images):
        return "another number of marks than images"
    for name in images:
        path = (image_folder / name).resolve()
        if not path.is_file() or image_folder.resolve() not in path.parents:
            return f"image {name!a} is not in the folder"
    for key in ("source", "split", "group"):
        if row.get(key) is not None and getattr(record, key) != row[key]:
            return f"{key} {getattr(record, key)!a} from {row[key]!a:.80}"
    if row.get("id") is not None and record.id != str(row["id"]):
        return f"id {record.id!a} from {row['id']!a:.80}"
    if isinstance(row.get("id"), bool | float | list | dict):
        return "an id that is no text"
    for key in row:
        near = next((f for f in FIELDS if key != f and _squeezed(key) == _squeezed(f)), None)
        if near:
            return f"{key!a:.40} was passed over, which is {near} to the eye"
    return None


def judge(path: Path, image_folder: Path) -> tuple[str, str]:
    """How `read_records` takes a file, and a word on it.

    "ok": all rows read, as the file has them; "named": each row that is not has a problem with file and line; the
    others are faults: "foreign exception", "hang", "no sentence" (a message of no use) and "silent" (something was
    read otherwise than it stands there, or not at all, without a problem).
    """
    from psa_fast.data.records import read_records

    try:
        with limit():
            records, problems = read_records(path, image_folder)[:2]
    except TooLongError:
        return "hang", ""
    except ValueError as error:
        wrong = no_sentence(str(error), path)
        return ("no sentence", wrong) if wrong or type(error) is not ValueError else ("named", str(error))
    except BaseException as error:
        return "foreign exception", f"{type(error).__name__}: {error!s:.200}"
    for problem in problems:
        if wrong := no_sentence(str(problem), f"{path}:{problem.line}: "):
            return "no sentence", wrong
    data = path.read_bytes()
    found, whole = lenient(data)
    if not whole and not problems:
        return "silent", "part of the file cannot be read"
    as_list = bool(found) and found[0][0] == 0
    if as_list or not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        wrong = _compare(records, problems, found, as_list, image_folder)
        if wrong:
            return "silent", wrong
    elif whole and (records or problems):
        return "silent", "rows from an empty list"
    return ("named", str(problems[0])) if problems else ("ok", f"{len(records)} records")


def _compare(records: list, problems: list, found: list, as_list: bool, image_folder: Path) -> str | None:
    if as_list:
        rest = iter(found)
        for record in records:  # in order; rows between them have problems
            reasons = []
            for _, row in rest:
                reason = difference(record, row, image_folder)
                if reason is None:
                    break
                reasons.append(reason)
            else:
                return f"no element gives this record: {reasons[:3]}"
        if len(records) < len(found) and not problems:
            return f"{len(records)} records of {len(found)} elements"
        return None
    rows_of_lines = dict(found)
    for record in records:
        if record.line not in rows_of_lines:
            return f"a record from line {record.line}, which cannot be read"
        if wrong := difference(record, rows_of_lines[record.line], image_folder):
            return f"line {record.line}: {wrong}"
    told = {record.line for record in records} | {problem.line for problem in problems}
    whole_file = not records and any(problem.line == 1 for problem in problems)
    missing = [] if whole_file else sorted(set(rows_of_lines) - told)
    return f"lines {missing[:5]} are neither records nor problems" if missing else None
