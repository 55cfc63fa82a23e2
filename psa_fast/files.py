"""Strict readers of JSON and YAML, and writers that leave either the whole file or none.

Both readers refuse what a lenient one would change in silence: a repeated key (the last one wins otherwise), text that
cannot be written as UTF-8, numbers that are none. Every fault is a ValueError of one sentence that names the file and,
where the format tells it, the line.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

SHOWN = 80  # characters of a foreign value that a message repeats
LONGEST_PATH = 300  # characters of a path that a message repeats
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
        if isinstance(value, str):
            text = repr(value[:limit])
        else:
            # YAML's aliases make a value of a few hundred bytes whose repr would fill the memory
            text = repr(value) if _is_small(value) else _ABRIDGED.repr(value)
    # an integer of more digits than Python prints; a list within a list within ...
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    if isinstance(value, str) and len(value) > limit:
        text += "..."
    return text if len(text) <= limit + 10 else text[:limit] + "..."


_ABRIDGED = reprlib.Repr()
_ABRIDGED.maxstring = _ABRIDGED.maxother = _ABRIDGED.maxlong = SHOWN


def _is_small(value: Any, budget: int = 10_000) -> bool:
    """Whether the value's parts and characters, each counted as often as it is met, stay within the budget."""
    pending = [value]
    while pending and budget > 0:
        item = pending.pop()
        parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        if isinstance(item, dict | list | tuple | set | frozenset):
            budget -= 1 + len(parts)
            pending += parts if budget > 0 else ()
        else:
            budget -= len(item) if isinstance(item, str | bytes) else 1
    return budget > 0


def shown(path: str | Path) -> str:
    """Return a path as messages show it: as it is, if it is of a usual length and prints on one line."""
    text = str(path)
    return text if text.isprintable() and len(text) <= LONGEST_PATH else shorten(text, LONGEST_PATH)


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
            raise ValueError(f"{what} {shown(path)}: {'is not a file' if path.exists() else 'no such file'}")
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = foreign_format(data)
        reason = f"is {found}, not UTF-8 text" if found else f"is not UTF-8 text ({error.reason} at byte {error.start})"
        raise ValueError(f"{what} {shown(path)} {reason}") from None
    except OSError as error:
        raise ValueError(f"{what} {shown(path)}: {error.strerror or error}") from None


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Return the JSON object that a file holds, `what` as in `read_text`.

    Raises:
        ValueError: naming the file and, where it is known, the line.
    """
    text = read_text(path, what)
    try:
        value = parse_json(text)
    except RepeatedKey as error:
        raise ValueError(f"{what} {shown(path)}:{_line_of_repeated_key(text)}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} {shown(path)}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} {shown(path)} must hold one JSON object, not a {type(value).__name__}")
    if wrong := unwritable_text(value):
        raise ValueError(f"{what} {shown(path)}: {wrong}, which is no text")
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


_MOST_KEYS = 100_000


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a repeated key; keys that a merge (`<<`) brings may be overridden, as YAML has it."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flattened: dict[int, Any] = {}

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, _Unreadable, RecursionError):
            raise
        except Exception as error:  # hostile scalars raise nearly anything: Value, Key, Attribute, OverflowError
            raise _Unreadable(node.start_mark.line + 1, f"a value cannot be read ({shorten(str(error))})") from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        if isinstance(node, yaml.MappingNode) and id(node) not in self._flattened:
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                    continue
                key = self.construct_object(key_node)
                line = key_node.start_mark.line + 1
                if key in seen:
                    raise _Unreadable(line, f"the key {shorten(key)} stands in line {seen[key]} already")
                seen[key] = line
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Put a mapping's merges in place, once: they are part of it from then on, its own keys after theirs."""
        if id(node) in self._flattened:
            return
        self._flattened[id(node)] = node
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:  # merges of merges of merges: a few lines become any number of keys
            raise _Unreadable(node.start_mark.line + 1, f"its merges come to more than {_MOST_KEYS} keys")

    def construct_yaml_int(self, node: Any) -> int:
        """Refuse what YAML 1.1 alone takes for a number: 010 would be 8, and 1:30 be 90."""
        text = node.value.lstrip("+-")
        if ":" in text or re.fullmatch("0[0-7_]+", text):
            raise ValueError(f"{shorten(node.value)} is no decimal number; quote it if it is text")
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        """As for whole numbers: 1:30.5 would be 90.5."""
        if ":" in node.value:
            raise ValueError(f"{shorten(node.value)} is no decimal number; quote it if it is text")
        return super().construct_yaml_float(node)


for _tag in ("int", "float"):
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(_UniqueKeys, f"construct_yaml_{_tag}"))


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
        raise ValueError(f"{what} {shown(path)}{place} is not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ValueError(f"{what} {shown(path)} is nested too deeply") from None
    except _Unreadable as error:
        raise ValueError(f"{what} {shown(path)}:{error.line}: {error.reason}") from None
    except Exception as error:  # the reader and the parser meet hostile bytes: a character YAML does not allow, ...
        raise ValueError(f"{what} {shown(path)} is not valid YAML: {shorten(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} {shown(path)} is not a mapping of keys")
    return value


def refuse_pipe_or_folder(path: str | Path) -> None:
    """Raise ValueError for what stands in the place of a file of ours: opening a pipe would wait for ever."""
    path = Path(path)
    if path.is_dir() or path.is_fifo():
        raise ValueError(f"{shown(path)} is a {'folder' if path.is_dir() else 'pipe'}, not a file")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, its folder made if need be.

    Raises:
        OSError: naming the path, if it cannot be written; what stood there before stays.
    """
    write_with(path, lambda unfinished: Path(unfinished).write_text(text, encoding="utf-8", newline="\n"))


def write_with(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a name beside `path`, then move what it wrote to `path`; nothing is left if it fails.

    A link keeps leading where it leads: the file there is written.

    Raises:
        OSError: naming the path, if it cannot be written.
        ValueError: it names a folder, or a pipe or device, whose place a file must not take.
    """
    if str(path) == "" or "\0" in str(path):
        raise ValueError(f"{shorten(str(path))} cannot name a file")
    path = Path(path)
    with named(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise ValueError(f"{shown(path)} is {'a folder' if target.is_dir() else 'a device or pipe'}, not a file")
    # cut, so that whatever name the file itself may have, this one is not too long
    unfinished = target.with_name(f".{target.name[:40]}.{os.getpid()}.part")
    try:
        with named(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            os.replace(unfinished, target)
    finally:
        with suppress(OSError):  # what is not there, or never could be, need not go
            unfinished.unlink()


def lock(path: Path, busy: str, say: Callable[[str], object] = print) -> TextIO:
    """Return the open file of a lock that this process holds until the file is closed, however the process ends.

    Args:
        path: of the lock's file, which is made.
        busy: what to raise if another process holds it.
        say: told that the file system has no locks, where it has none.

    Raises:
        ValueError: `busy`, or a pipe or folder in the file's place.
        OSError: naming the path, if it cannot be opened.
    """
    import fcntl

    refuse_pipe_or_folder(path)
    with named(path):
        file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(busy) from None
    except OSError as error:  # some network file systems have no locks
        say(f"{path} cannot be locked ({error.strerror}): see to it that no other run writes here")
    return file


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
            if error.filename is not None and str(self.path) in str(error.filename):
                return
            raise OSError(error.errno, f"{error.strerror or error}", str(self.path)) from error
        if isinstance(error, Exception) and not isinstance(error, ValueError) and self.FAILED_WRITES.search(str(error)):
            free = " (no space left)" if _is_full(self.path) else ""
            raise OSError(f"{self.path} cannot be written{free}: {shorten(str(error).splitlines()[0])}") from error


def _is_full(path: Path) -> bool:
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    return os.statvfs(folder).f_bavail < 1024
