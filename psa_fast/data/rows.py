"""Raw rows of a .jsonl file, or of a .json file that holds one list, each with the line it starts on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One JSON value and its line (from 1), or the reason why the text there is not JSON."""

    line: int
    value: Any = None
    error: str | None = None


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of `path`, which may start with a BOM; blank lines are skipped.

    The content decides the format, not the file's name: published lists come as .jsonl and the other way round.
    Raises ValueError if the file does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist or is not a file")
    with path.open("rb") as file:
        first = b""
        while not first and (line := file.readline()):
            first = line.removeprefix(b"\xef\xbb\xbf").strip()
    return _list_rows(path) if first.startswith(b"[") else _line_rows(path)


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not text.strip():
                continue
            try:
                yield Row(number, json.loads(text.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield Row(number, error=f"the line is not UTF-8 ({error.reason} at byte {error.start})")
            except (json.JSONDecodeError, RecursionError) as error:
                yield Row(number, error=f"the line is not a JSON object ({error})")


def _list_rows(path: Path) -> Iterator[Row]:
    """Decode element by element: after a syntax error there is no safe place to go on, so it is the last row."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Row(1, error=f"the file is not UTF-8 ({error.reason} at byte {error.start})")
        return
    decoder = json.JSONDecoder()
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    first = True
    while True:
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and first:
            break
        try:
            value, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Row(line, error=f"the list is not JSON from here on ({error})")
            return
        yield Row(line, value)
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


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position
