"""Strict readers of JSON and YAML, and writers that leave either the whole file or none.

Both readers refuse what a lenient one would change in silence: a repeated key (the last one wins otherwise), text that
cannot be written as UTF-8, numbers that are none. Every fault is a ValueError of one sentence that names the file and,
where the format tells it, the line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

SHOWN = 80  # characters of a foreign value that a message repeats
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


def shorten(value: Any, limit: int = SHOWN) -> str:
    """Return `repr(value)` on one line of at most `limit` characters, for messages about foreign values."""
    try:
        text = repr(value[:limit] if isinstance(value, str) else value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of more digits than Python prints; a list within a list within ...
        return f"a {type(value).__name__} too large to show"
    if isinstance(value, str) and len(value) > limit:
        text += "..."
    return text if len(text) <= limit + 10 else text[:limit] + "..."


def foreign_format(head: bytes) -> str | None:
    """Return the name of the binary format that a file's first bytes announce, None for none that is known."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def parse_json(text: str, constants: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the whole text.
        constants: accept NaN and Infinity, which pandas writes for what is missing.

    Raises:
        ValueError: not JSON, a repeated key, an integer of too many digits, nesting that is too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=None if constants else _no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class RepeatedKey(ValueError):
    """A key that stands twice in one JSON object."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict: the `object_pairs_hook` that raises RepeatedKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RepeatedKey(f"the key {shorten(key)} stands twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def unwritable_text(value: Any, place: str = "") -> str | None:
    """Return where a decoded JSON value holds text that UTF-8 cannot express (a lone surrogate), None if nowhere."""
    pending: list[tuple[str, Any]] = [(place, value)]
    while pending:
        where, item = pending.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                return f"{where or 'the text'} holds {item[error.start]!a} at character {error.start}"
        elif isinstance(item, dict):
            pending += [(_below(where, key), part) for key, part in item.items()]
            pending += [(f"a key of {where or 'the object'}", key) for key in item]
        elif isinstance(item, list):
            pending += [(f"{where}[{index}]", part) for index, part in enumerate(item)]
    return None


def _below(where: str, key: str) -> str:
    shown = key.encode("ascii", "backslashreplace").decode()[:SHOWN]
    return f"{where}.{shown}" if where else shown


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a UTF-8 file, without a BOM.

    Args:
        path: the file; pipes and devices, on which reading might never end, are refused.
        what: what the file is to the user, the first words of every message ("policy", "recipe", ...).

    Raises:
        ValueError: naming the file, for one that is absent, cannot be read or is not UTF-8 text.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError(f"{what} {path}: {'is not a file' if path.exists() else 'no such file'}")
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = foreign_format(data)
        reason = f"is {found}, not UTF-8 text" if found else f"is not UTF-8 text ({error.reason} at byte {error.start})"
        raise ValueError(f"{what} {path} {reason}") from None
    except OSError as error:
        raise ValueError(f"{what} {path}: {error.strerror or error}") from None


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Return the JSON object that a file holds, `what` as in `read_text`.

    Raises:
        ValueError: naming the file and, where it is known, the line.
    """
    text = read_text(path, what)
    try:
        value = parse_json(text)
    except RepeatedKey as error:
        raise ValueError(f"{what} {path}:{_line_of_repeated_key(text)}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} {path} must hold one JSON object, not a {type(value).__name__}")
    if wrong := unwritable_text(value):
        raise ValueError(f"{what} {path}: {wrong}, which is no text")
    return value


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}\[\]]', re.DOTALL)


def _line_of_repeated_key(text: str) -> int | None:
    """Line of the first key that repeats within its object; the decoder's hook is not told where it stands."""
    open_objects: list[set[str]] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in "{[":
            open_objects.append(set())
        elif token in "}]":
            if open_objects:
                open_objects.pop()
        elif match.group(1) and open_objects:
            key = json.loads(token[: len(token) - len(match.group(1))])
            if key in open_objects[-1]:
                return text.count("\n", 0, match.start()) + 1
            open_objects[-1].add(key)
    return None


class _Unreadable(Exception):
    """A line of a YAML file, and what is wrong there."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a repeated key; keys that a merge (`<<`) brings may be overridden, as YAML has it."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, _Unreadable, RecursionError):
            raise
        except Exception as error:  # hostile scalars raise nearly anything: Value, Key, Attribute, OverflowError
            raise _Unreadable(node.start_mark.line + 1, f"a value cannot be read ({shorten(str(error))})") from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise _Unreadable(line, f"the key {shorten(key)} stands in line {seen[key]} already")
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, what: str) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds, `what` as in `read_text`.

    Raises:
        ValueError: naming the file and, where it is known, the line.
    """
    text = read_text(path, what)
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{what} {path}{place} is not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ValueError(f"{what} {path} is nested too deeply") from None
    except _Unreadable as error:
        raise ValueError(f"{what} {path}:{error.line}: {error.reason}") from None
    except Exception as error:  # the reader and the parser meet hostile bytes: a character YAML does not allow, ...
        raise ValueError(f"{what} {path} is not valid YAML: {shorten(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} {path} is not a mapping of keys")
    return value


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, its folder made if need be.

    Raises:
        OSError: naming the path, if it cannot be written; what stood there before stays.
    """
    write_with(path, lambda unfinished: Path(unfinished).write_text(text, encoding="utf-8", newline="\n"))


def write_with(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a name beside `path`, then move what it wrote to `path`; nothing is left if it fails.

    Raises:
        OSError: naming the path, if it cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class named:
    """Context in which a failure to write becomes an OSError that names `path`, whichever library it comes from."""

    # what the writers of tensors raise when the disk is full; their own classes are no OSErrors
    FAILED_WRITES = re.compile(
        r"unexpected pos|file write failed|PytorchStreamWriter|No space left|I/O ?[eE]rror|os error"
    )

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            if error.filename is not None and str(self.path) in str(error):
                return
            raise OSError(error.errno, f"{error.strerror or error}", str(self.path)) from error
        if isinstance(error, Exception) and not isinstance(error, ValueError) and self.FAILED_WRITES.search(str(error)):
            free = " (no space left)" if _is_full(self.path) else ""
            raise OSError(f"{self.path} cannot be written{free}: {shorten(str(error).splitlines()[0])}") from error


def _is_full(path: Path) -> bool:
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    return os.statvfs(folder).f_bavail < 1024
