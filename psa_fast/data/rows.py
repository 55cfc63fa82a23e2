"""Raw rows of a .jsonl file, or of a .json file that holds one list, each with the line it starts on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from psa_fast.data.stand_ins import placeholder
from psa_fast.files import foreign_format, named, read_text, shorten, unique_keys, unwritable_text

MAX_DIGITS = 1000  # of an integer: Python itself stops at 4300
MAX_DEPTH = 100  # lists and objects within each other: what reads deeper rows later would run out of stack
_PAIR = re.compile(r"\\u[dD](?:[89abAB]..(?:\\u[dD][c-fC-F]..)?|[c-fC-F]..)")  # or half of one, which is shorter


CONVERT = "`psa-fast data import records --source PATH --images DIR --out FILE.jsonl` makes records of it"


def folder_hint(path: Path) -> str:
    """What to do with a folder that Hugging Face `datasets` wrote, as the end of a sentence; empty for others."""
    theirs = any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
    return f": it is a folder of datasets; {CONVERT}" if theirs else ""


class Row(NamedTuple):
    """One JSON value and its line (from 1), or the reason why the text there is not one that we take."""

    line: int
    value: Any = None
    error: str | None = None


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of `path`, which may start with a BOM; blank lines are skipped.

    The content decides the format, not the file's name: published lists come as .jsonl and the other way round. NaN is
    accepted, since pandas writes it for what is missing; a repeated key, a number of more than MAX_DIGITS digits,
    nesting deeper than MAX_DEPTH and text that UTF-8 cannot express are not.

    Raises ValueError if the file does not exist, OSError, naming it, if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist or is not a file{folder_hint(path)}")
    with named(path), path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"PAR1"):
            return iter([Row(1, error=f"the file is Parquet; {CONVERT}")])
        if found := foreign_format(head) or ("UTF-16 or binary" if b"\0" in head else None):
            todo = "save it as UTF-8" if found.startswith("UTF") else "unpack or convert it first"
            return iter([Row(1, error=f"the file is {found}; {todo}")])
        if stands := placeholder(head):
            return iter([Row(1, error=f"the file is {stands}")])
        file.seek(0)
        first = b""
        while not first and (line := file.readline()):
            first = line.removeprefix(b"\xef\xbb\xbf").strip()
    if first == b"{":
        return iter([Row(1, error="an object stands on several lines; expected one a line, or one list of them")])
    return _list_rows(path) if first.startswith(b"[") else _line_rows(path)


_UNESCAPED = json.JSONEncoder(ensure_ascii=False)


class _LongInteger(ValueError):
    """An integer of more than MAX_DIGITS digits; the decoder does not tell where it stands."""


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _LongInteger(f"an integer has {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=_integer)
# takes any value, to tell where it ends and which number is the long one
_LENIENT = json.JSONDecoder(parse_int=lambda text: _LongInteger(text) if len(text) > MAX_DIGITS else 0)


def _reason(error: ValueError, value: Any) -> str:
    """The decoder's reason, with the place if it is a long integer's; `value` as the lenient decoder gives it."""
    if isinstance(error, _LongInteger):
        pending = [("", value)]
        while pending:
            place, item = pending.pop()
            if isinstance(item, _LongInteger):
                return f"{place[1:81]}: {error}"
            if isinstance(item, dict):
                pending += [(f"{place}.{ascii(key)[1:-1]}", part) for key, part in item.items()]
            elif isinstance(item, list):
                pending += [(f"{place}[{index}]", part) for index, part in enumerate(item)]
    return str(error)


def _value_error(value: Any, text: str) -> str | None:
    """What is wrong with a decoded value of this text. Most texts need no look at the value."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return "the row is nested too deeply"
    if "\\ud" in text or "\\uD" in text:  # emoji mostly; where backslashes are escaped too, only the value tells
        if "\\\\" not in text and all(len(pair) == 12 for pair in _PAIR.findall(text)):
            return None
        try:
            _UNESCAPED.encode(value).encode()
        except UnicodeEncodeError:
            return f"{(unwritable_text(value) or 'the row')[:200]}, which is no text"
    return None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        level = [part for item in level if isinstance(item, dict | list) for part in _parts(item)]
        depth += 1
    return depth


def _parts(item: dict | list) -> Any:
    return item.values() if isinstance(item, dict) else item


def _line_rows(path: Path) -> Iterator[Row]:
    with named(path), path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8") if number == 1 else raw.decode("utf-8")
                if number == 1 and not text.strip():
                    continue
                value = _DECODER.decode(text)
            except UnicodeDecodeError as error:
                yield Row(number, error=f"the line is not UTF-8 ({error.reason} at byte {error.start})")
            except json.JSONDecodeError as error:
                hint = "; does a carriage return alone end its lines?" if "\r" in text.rstrip() else ""
                yield Row(number, error=f"the line is not a JSON object ({error.msg} at column {error.colno}{hint})")
            except ValueError as error:
                try:
                    reason = _reason(error, _LENIENT.decode(text))
                except (ValueError, RecursionError):  # a second fault further on
                    reason = str(error)
                yield Row(number, error=reason)
            except RecursionError:
                yield Row(number, error="the row is nested too deeply")
            else:
                wrong = _value_error(value, text)
                yield Row(number, error=wrong) if wrong else Row(number, value)


def _list_rows(path: Path) -> Iterator[Row]:
    """Decode element by element: after a syntax error there is no safe place to go on, so it is the last row."""
    try:
        with named(path):
            text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Row(1, error=f"the file is not UTF-8 ({error.reason} at byte {error.start})")
        return
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    first = True
    while True:
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and first:
            break
        try:
            value, end = _DECODER.raw_decode(text, position)
            wrong = _value_error(value, text[position:end])
        except json.JSONDecodeError as error:
            yield Row(line, error=f"the list is not JSON from here on ({error})")
            return
        except ValueError as error:
            try:
                value, end = _LENIENT.raw_decode(text, position)
            except (ValueError, RecursionError):
                yield Row(line, error=f"{error}; the list cannot be read from here on")
                return
            wrong = _reason(error, value)
        except RecursionError:
            yield Row(line, error="the row is nested too deeply; the list cannot be read from here on")
            return
        yield Row(line, error=wrong) if wrong else Row(line, value)
        first = False
        position = _skip(text, end)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            line += text.count("\n", counted, position)
            yield Row(line, error=f"the list is not JSON from here on (expected ',' or ']', found {mark!r})")
            return
        position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        yield Row(text.count("\n", 0, rest) + 1, error="text after the end of the list")


def read_entries(path: str | Path, what: str) -> Iterator[tuple[str, Row]]:
    """Yield the keys of a JSON object with their values, each with the line that its key stands on.

    Args:
        path: the file, which holds one object.
        what: the file in messages.

    Raises:
        ValueError: naming file and line, for a file that is absent, no UTF-8 text or no object. What is wrong further
            on, a key that repeats among it, is the error of the last row.
    """
    text = read_text(path, what)
    position = _skip(text, 0)
    if stands := placeholder(text[:64].encode()):
        raise ValueError(f"{path}:1: the file is {stands}")
    if text[position : position + 1] != "{":
        raise ValueError(f"{path}:1: {what} must hold one JSON object")
    position, line, counted = _skip(text, position + 1), 1, 0
    seen: set[str] = set()
    done = text[position : position + 1] == "}"
    while not done:
        line, counted = line + text.count("\n", counted, position), position
        try:
            key, end = _DECODER.raw_decode(text, position)
            position = _skip(text, end)
            if not isinstance(key, str) or text[position : position + 1] != ":":
                raise ValueError("expected a key and ':'")
            if key in seen:
                raise ValueError(f"the key {shorten(key)} stands twice in one object")
            start = _skip(text, position + 1)
            value, end = _DECODER.raw_decode(text, start)
            wrong = _value_error(value, text[start:end])
        except (ValueError, RecursionError) as error:
            yield "", Row(line, error=f"the object is not JSON from here on ({error})")
            return
        seen.add(key)
        yield key, Row(line, error=wrong) if wrong else Row(line, value)
        position = _skip(text, end)
        done = text[position : position + 1] == "}"
        if not done and text[position : position + 1] != ",":
            line += text.count("\n", counted, position)
            yield "", Row(line, error="the object is not JSON from here on (expected ',' or '}')")
            return
        position = position if done else _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        yield "", Row(text.count("\n", 0, rest) + 1, error="text after the end of the object")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position
