"""The record: one labelled conversation about images, validated with file and line. See docs/data.md."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from psa_fast.data.images import ImageError, check_image, resolve
from psa_fast.data.rows import read_rows
from psa_fast.taxonomy import CLEAN, level_id, type_id

logger = logging.getLogger(__name__)

IMAGE_MARK = "<image>"
SPLIT_MARK = "<split>"  # the official format's separator of two images in one path
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
GROUPS = ("clean", "benign_twin", "risk", "text_risk", "text_twin")
BENIGN_GROUPS = ("clean", "benign_twin", "text_twin")
FIELDS = ("image", "safe_type", "safe_level", "conversations", "id", "source", "source_label", "split", "group")
MAX_LISTED = 100
NO_IMAGE_FOLDER = "needs an image folder (--image_folder)"


class Turn(NamedTuple):
    """One message; `text` holds an `<image>` mark where an image stands."""

    role: Literal["user", "assistant"]
    text: str


class Problem(NamedTuple):
    """What is wrong with one row."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Record:
    """A validated row.

    `images` are paths relative to the image folder, in the order of the `<image>` marks in `turns`.
    `safe_type` and `safe_level` are ids, or None where the row has no label (plain instruction data).
    `group` is the evaluation group (GROUPS), by default "clean" for type clean, "risk" for another,
    and empty without a type.
    Keys that we do not know are kept in `extra`.
    """

    images: tuple[str, ...]
    safe_type: int | None
    safe_level: int | None
    turns: tuple[Turn, ...]
    id: str | None = None
    source: str | None = None
    source_label: Any = field(default=None, hash=False)
    split: str | None = None
    group: str = ""
    path: str = ""
    line: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", _default_group(self.safe_type))

    @property
    def where(self) -> str:
        """`file:line` of the row, for messages."""
        return f"{self.path}:{self.line}"

    def to_row(self) -> dict[str, Any]:
        """The record as a JSON row in our own spelling (ids as numbers, roles user and assistant)."""
        optional = {name: getattr(self, name) for name in FIELDS if name not in ("image", "conversations")}
        row = {name: value for name, value in optional.items() if value is not None}
        if self.images:
            row["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        row["conversations"] = [{"from": turn.role, "value": turn.text} for turn in self.turns]
        return row | dict(self.extra)


class DataError(ValueError):
    """Bad rows; `problems` holds all of them, the message the first MAX_LISTED."""

    def __init__(self, path: str | Path, problems: Sequence[Problem]):
        self.problems = list(problems)
        listed = [f"  {problem}" for problem in problems[:MAX_LISTED]]
        lines = [f"{len(problems)} problem(s) in {str(path)!r}:", *listed]
        if len(problems) > MAX_LISTED:
            lines.append(f"  ... and {len(problems) - MAX_LISTED} more; `psa-fast data check` lists all of them")
        super().__init__("\n".join(lines))


def load_records(
    path: str | Path,
    image_folder: str | Path | None,
    on_bad_sample: Literal["error", "skip"] = "error",
    decode: bool = True,
) -> list[Record]:
    """Records of a .jsonl or .json file, in file order.

    Args:
        path: the data file.
        image_folder: folder that image paths are relative to; None only for data without images.
        on_bad_sample: "error" raises DataError naming every bad row, "skip" drops them and logs how many and why.
        decode: decode every image now; False reads headers only, and a truncated file is met when it is used.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}; expected 'error' or 'skip'")
    records, problems = read_records(path, image_folder, decode=decode)
    if problems and on_bad_sample == "error":
        raise DataError(path, problems)
    if problems:
        for problem in problems[:MAX_LISTED]:
            logger.warning("skipped %s", problem)
        logger.warning("%s: skipped the bad rows (%d problems), kept %d", path, len(problems), len(records))
    if not records:
        raise ValueError(f"{str(path)!r} holds no usable record")
    return records


def find_problems(path: str | Path, image_folder: str | Path | None) -> list[Problem]:
    """Every problem of every row, in file order; images are decoded in full. What `psa-fast data check` prints."""
    records, problems = read_records(path, image_folder)
    if not records and not problems:
        return [Problem(str(path), 1, "the file holds no records")]
    return problems


def read_records(
    path: str | Path, image_folder: str | Path | None, decode: bool = True
) -> tuple[list[Record], list[Problem]]:
    """The good records and the problems of the bad rows. Raises ValueError if file or folder do not exist."""
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"image folder {str(image_folder)!r} does not exist or is not a folder")
    parsed: list[tuple[int, Record]] = []  # with the row's number: a compact .json list has all rows on one line
    problems: list[tuple[int, Problem]] = []
    lines_of_ids: dict[str, int] = {}
    for number, row in enumerate(read_rows(path)):
        try:
            messages, record = ([row.error], None) if row.error else parse_row(row.value, str(path), row.line)
        except RecursionError:
            messages, record = ["the row is nested too deeply"], None
        if record is not None and record.id is not None:
            if record.id in lines_of_ids:
                messages = [*messages, f"id {record.id!r} was used in line {lines_of_ids[record.id]} already"]
            lines_of_ids.setdefault(record.id, row.line)
        problems += [(number, Problem(str(path), row.line, message)) for message in messages]
        if record is not None:
            parsed.append((number, record))
    faults = _image_faults({name for _, record in parsed for name in record.images}, image_folder, decode)
    for number, record in parsed:
        wrong = [Problem(str(path), record.line, faults[name]) for name in record.images if name in faults]
        problems += [(number, problem) for problem in wrong]
    problems.sort(key=lambda entry: entry[0])
    bad = {number for number, _ in problems}
    return [record for number, record in parsed if number not in bad], [problem for _, problem in problems]


def _image_faults(names: set[str], image_folder: str | Path | None, decode: bool) -> dict[str, str]:
    """Reason for each image that cannot be used. Threads help: Pillow decodes outside the interpreter lock."""

    def fault(name: str) -> str | None:
        if image_folder is None:
            return f"field image: {name!r} {NO_IMAGE_FOLDER}"
        try:
            check_image(resolve(image_folder, name), decode=decode)
        except ImageError as error:
            return f"field image: {error}"
        return None

    ordered = sorted(names)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return {name: reason for name, reason in zip(ordered, pool.map(fault, ordered), strict=True) if reason}


def parse_row(row: Any, path: str, line: int) -> tuple[list[str], Record | None]:
    """Validate one decoded JSON row: the problems, and the record if its fields could be read at all.

    A record comes back beside problems too, so that its images are checked in the same pass.
    """
    if not isinstance(row, dict):
        return [f"the row is a JSON {_json_name(row)}; expected an object"], None
    messages: list[str] = []

    def read(reader: Any, *args: Any) -> Any:
        try:
            return reader(*args)
        except ValueError as error:
            messages.append(str(error))
            return None

    images, glued = read(_images, row.get("image")) or ((), False)
    safe_type = None if row.get("safe_type") is None else read(type_id, row["safe_type"])
    safe_level = None if row.get("safe_level") is None else read(level_id, row["safe_level"])
    if safe_type == CLEAN and safe_level:
        messages.append(f"safe_level is {safe_level}, but safe_type is {CLEAN} (clean), whose only level is 0")
    turns, faults = _turns(row.get("conversations"))
    messages += faults
    group = read(_group, row.get("group"), safe_type)
    texts = {name: read(_text, name, row.get(name)) for name in ("id", "source", "split")}
    if turns is None:
        return messages, None
    if glued and _marks(turns) == 1:  # the official code glues both images side by side at the one mark
        turns = tuple(Turn(t.role, t.text.replace(IMAGE_MARK, f"{IMAGE_MARK}\n{IMAGE_MARK}")) for t in turns)
    if not any(message.startswith("field image") for message in messages) and _marks(turns) != len(images):
        messages.append(
            f"field image names {len(images)} image(s), but the conversation has {_marks(turns)} {IMAGE_MARK} mark(s)"
        )
    extra = {name: value for name, value in row.items() if name not in FIELDS}
    record = Record(
        images=images,
        safe_type=safe_type,
        safe_level=safe_level,
        turns=turns,
        source_label=row.get("source_label"),
        group=group or "",
        path=path,
        line=line,
        extra=extra,
        **texts,
    )
    return messages, record


def _marks(turns: Sequence[Turn]) -> int:
    return sum(turn.text.count(IMAGE_MARK) for turn in turns)


def _images(value: Any) -> tuple[tuple[str, ...], bool]:
    """Image paths, and whether they came as an official `a<split>b` pair."""
    if value is None or value == []:
        return (), False
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"field image is {value!r}; expected a path or a list of paths")
    if isinstance(value, str) and SPLIT_MARK in value:
        names = [name.strip() for name in value.split(SPLIT_MARK)]
        if len(names) != 2 or not all(names):
            raise ValueError(f"field image is {value!r}; expected two paths around one {SPLIT_MARK}")
        return tuple(names), True
    return tuple(names), False


def _turns(value: Any) -> tuple[tuple[Turn, ...] | None, list[str]]:
    """Turns of the field conversations, and what is wrong with them (None if they cannot be read)."""
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else "empty" if value == [] else f"a JSON {_json_name(value)}"
        return None, [f"field conversations is {found}; expected a list of user and assistant turns"]
    turns: list[Turn] = []
    faults: list[str] = []
    for index, item in enumerate(value):
        name = f"conversations[{index}]"
        if not isinstance(item, dict):
            faults.append(f"{name} is a JSON {_json_name(item)}; expected an object with from and value")
            continue
        sender, text = item.get("from"), item.get("value")
        role = ROLES.get(sender.strip().lower()) if isinstance(sender, str) else None
        if role is None:
            faults.append(f"{name}.from is {sender!r}; expected user (human) or assistant (gpt)")
        if not isinstance(text, str):
            found = "missing" if text is None else f"a JSON {_json_name(text)}"
            faults.append(f"{name}.value is {found}; expected text")
        if role is None or not isinstance(text, str):
            continue
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            faults.append(f"{name}.from is {sender!r}, but turns must alternate from the user on: expected {expected}")
        if not text.strip():
            faults.append(f"{name}.value is empty; {'an answer' if role == 'assistant' else 'a question'} needs text")
        if role == "assistant" and IMAGE_MARK in text:
            faults.append(f"{name}.value holds an {IMAGE_MARK} mark, which only a user's turn may")
        turns.append(Turn(role, text))  # type: ignore[arg-type]
    if len(turns) == len(value) and turns[-1].role == "user":
        faults.append("conversations ends with a user's turn; expected an answer at the end")
    return (tuple(turns) if len(turns) == len(value) else None), faults


def _default_group(safe_type: int | None) -> str:
    if safe_type is None:
        return ""
    return "clean" if safe_type == CLEAN else "risk"


def _group(value: Any, safe_type: int | None) -> str:
    if value is None:
        return _default_group(safe_type)
    if value not in GROUPS:
        raise ValueError(f"group is {value!r}; expected one of: {', '.join(GROUPS)}")
    if value in BENIGN_GROUPS and safe_type not in (CLEAN, None):
        raise ValueError(f"group is {value!r}, but safe_type is {safe_type}, which is not clean")
    if value == "risk" and safe_type == CLEAN:
        raise ValueError(f"group is 'risk', but safe_type is {CLEAN} (clean)")
    return str(value)


def _text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"field {name} is {value!r}; expected text")


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def fingerprint(records: Sequence[Record]) -> str:
    """SHA-256 of what training takes from the records, in their order: images by path, labels and turns."""
    digest = hashlib.sha256()
    for record in records:
        row = (record.images, record.safe_type, record.safe_level, [tuple(turn) for turn in record.turns])
        digest.update(repr(row).encode())
    return digest.hexdigest()
