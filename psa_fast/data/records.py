"""The record: one labelled conversation about images, validated with file and line. See docs/data.md."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from psa_fast.data.fields import (
    IMAGE_MARK,
    SPLIT_MARK,
    Box,
    Turn,
    count_marks,
    foreign_taxonomy,
    json_name,
    read_group,
    read_images,
    read_level,
    read_regions,
    read_rejected,
    read_text,
    read_turns,
)
from psa_fast.data.images import ImageError, check_image, resolve
from psa_fast.data.keys import FIELDS, TEMPLATE, foreign_layout, meant_field
from psa_fast.data.labels import (
    GROUPS,
    LABELS,
    UNKNOWN,
    contradictions,
    default_group,
    default_labels,
    own_label,
    read_label,
)
from psa_fast.data.problems import MAX_LISTED, DataError, Problem, list_problems
from psa_fast.data.progress import progress
from psa_fast.data.rows import read_rows
from psa_fast.files import shorten
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

__all__ = [
    "FIELDS",
    "GROUPS",
    "IMAGE_MARK",
    "NO_IMAGE_FOLDER",
    "SPLIT_MARK",
    "DataError",
    "Problem",
    "Reading",
    "Record",
    "Turn",
    "find_problems",
    "fingerprint",
    "image_fault",
    "image_faults",
    "list_problems",
    "load_records",
    "parse_row",
    "read_records",
]

logger = logging.getLogger(__name__)

NO_IMAGE_FOLDER = "needs an image folder (--image_folder)"


@dataclass(frozen=True)
class Record:
    """A validated row.

    `images` are paths relative to the image folder, in the order of the `<image>` marks in `turns`.
    `safe_type` and `safe_level` are ids, or None where the row has no label (plain instruction data).
    `group` is the evaluation group (GROUPS), by default "clean" for type clean, "risk" for the others and "" without a
    type: such a row takes part in no safety metric. `image_label`, `text_label` and `joint_label` say what is unsafe
    (psa_fast.data.labels), by default what follows from group and type. `regions` are the boxes of the images that the
    label rests on, where they are known. Rows of one `twin` belong in one split; `rejected` holds answers that were
    judged worse than the last one. Keys that we do not know are kept in `extra`. `taxonomy` is what the ids are of.
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
    image_label: str = ""
    text_label: str = ""
    joint_label: str = ""
    regions: tuple[Box | None, ...] = ()
    twin: str | None = None
    licence: str | None = None
    rejected: tuple[str, ...] = ()
    taxonomy: Taxonomy = field(default=PSA, repr=False)

    def __post_init__(self) -> None:
        if not self.group:
            given = self.image_label or None, self.text_label or None, self.joint_label or None
            object.__setattr__(self, "group", default_group(self.safe_type, given, self.taxonomy))
        for name, default in zip(LABELS, self._default_labels, strict=True):
            if not getattr(self, name):
                object.__setattr__(self, name, default)

    @property
    def _default_labels(self) -> tuple[str, str, str]:
        return default_labels(self.group, self.safe_type, bool(self.images))

    @property
    def picture(self) -> tuple[int | None, int | None]:
        """Type and level of the picture by itself, whatever is said about it; None where that is not known."""
        label = self.image_label if self.images else UNKNOWN
        return own_label(label, self.safe_type, self.safe_level, self.taxonomy)

    @property
    def words(self) -> tuple[int | None, int | None]:
        """Type and level of the words by themselves, whatever is shown; None where that is not known."""
        return own_label(self.text_label, self.safe_type, self.safe_level, self.taxonomy)

    @property
    def where(self) -> str:
        """`file:line` of the row, for messages."""
        return f"{self.path}:{self.line}"

    def to_row(self) -> dict[str, Any]:
        """The record as a JSON row in our own spelling (ids as numbers, roles user and assistant)."""
        others = ("image", "conversations", "regions", "rejected", "taxonomy", *LABELS)
        optional = {name: getattr(self, name) for name in FIELDS if name not in others}
        row = {name: value for name, value in optional.items() if value is not None and (name, value) != ("group", "")}
        for name, default in zip(LABELS, self._default_labels, strict=True):
            if (value := getattr(self, name)) != default:
                row[name] = value
        if self.taxonomy != PSA and self.safe_type is not None:
            row["taxonomy"] = self.taxonomy.name
        if self.images:
            row["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        if self.regions:
            row["regions"] = [None if box is None else list(box) for box in self.regions]
        if self.rejected:
            row["rejected"] = list(self.rejected)
        row["conversations"] = [{"from": turn.role, "value": turn.text} for turn in self.turns]
        return row | dict(self.extra)


class Reading(NamedTuple):
    """What a data file holds: good records, the problems of the other rows, and how many rows have keys not read."""

    records: list[Record]
    problems: list[Problem]
    unread_keys: Counter[str]


def load_records(
    path: str | Path,
    image_folder: str | Path | None,
    on_bad_sample: Literal["error", "skip"] = "error",
    decode: bool = True,
    keep_keys: Collection[str] = (),
    taxonomy: Taxonomy = PSA,
) -> list[Record]:
    """Records of a .jsonl or .json file, in file order.

    Args:
        path: the data file.
        image_folder: folder that image paths are relative to; None only for data without images.
        on_bad_sample: "error" raises DataError naming every bad row, "skip" drops them and logs how many and why.
        decode: decode every image now; False reads headers only, and a truncated file is met when it is used.
        keep_keys: keys that look like ours (`label`, say) and are to be kept in `extra` unread; others of that kind
            make a row bad.
        taxonomy: what labels are of; a labelled row of another one is bad.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}; expected 'error' or 'skip'")
    records, problems, unread = read_records(path, image_folder, decode, keep_keys, taxonomy)
    if problems and on_bad_sample == "error":
        raise DataError(path, problems)
    if problems:
        for line in list_problems(problems, MAX_LISTED):
            logger.warning("skipped %s", line)
        logger.warning("%s: skipped the bad rows (%d problems), kept %d", path, len(problems), len(records))
    if unread:
        logger.info("%s: not read: %s", path, unread_sentence(unread))
    if not records:
        raise ValueError(f"{str(path)!r} holds no usable record")
    return records


def unread_sentence(unread: Counter[str], limit: int = 20) -> str:
    """Return the keys that are not read, the most frequent first, with their numbers of rows."""
    shown = [f"{shorten(key)[1:-1]} ({count} rows)" for key, count in unread.most_common(limit)]
    more = len(unread) - len(shown)
    return ", ".join(shown) + (f" and {more} more keys" if more > 0 else "")


def find_problems(path: str | Path, image_folder: str | Path | None, keep_keys: Collection[str] = ()) -> list[Problem]:
    """Every problem of every row, in file order; images are decoded in full. What `psa-fast data check` prints."""
    records, problems, _ = read_records(path, image_folder, keep_keys=keep_keys)
    if not records and not problems:
        return [Problem(str(path), 1, "the file holds no records")]
    return problems


def read_records(
    path: str | Path,
    image_folder: str | Path | None,
    decode: bool = True,
    keep_keys: Collection[str] = (),
    taxonomy: Taxonomy = PSA,
) -> Reading:
    """The good records and the problems of the bad rows. Raises ValueError if file or folder do not exist."""
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"image folder {str(image_folder)!r} does not exist or is not a folder")
    name, keep = str(path), frozenset(keep_keys)
    parsed: list[tuple[int, Record]] = []  # with the row's number: a compact .json list has all rows on one line
    problems: list[tuple[int, Problem]] = []
    lines_of_ids: dict[str, int] = {}
    unread: Counter[str] = Counter()
    with progress(f"reading {name}") as advance:
        for number, row in enumerate(read_rows(path)):
            advance(1)
            if row.error:
                problems.append((number, Problem(name, row.line, row.error)))
                continue
            found, record = parse_row(row.value, name, row.line, keep, taxonomy)
            if record is not None:
                unread.update(record.extra.keys() - {TEMPLATE})  # a mapping's values would be taken for counts
                if record.id is not None:
                    if record.id in lines_of_ids:
                        message = f"id {shorten(record.id)} was used in line {lines_of_ids[record.id]} already"
                        found.append(Problem(name, row.line, message))
                    lines_of_ids.setdefault(record.id, row.line)
                parsed.append((number, record))
            problems += [(number, problem) for problem in found]
    faults = image_faults({image for _, record in parsed for image in record.images}, image_folder, decode)
    for number, record in parsed:
        for image in record.images:
            if image in faults:
                message, kind = faults[image]
                problems.append((number, Problem(name, record.line, message, kind)))
    problems.sort(key=lambda entry: entry[0])
    bad = {number for number, _ in problems}
    records = [record for number, record in parsed if number not in bad]
    return Reading(records, [problem for _, problem in problems], unread)


def image_fault(name: str, image_folder: str | Path | None, decode: bool = True) -> tuple[str, str] | None:
    """Message and kind for an image that cannot be used, None for one that can."""
    if image_folder is None:
        return f"field image: {shorten(name)} {NO_IMAGE_FOLDER}", NO_IMAGE_FOLDER
    try:
        check_image(resolve(image_folder, name), decode=decode)
    except ImageError as error:
        return f"field image: {error}", ""
    return None


def image_faults(names: set[str], image_folder: str | Path | None, decode: bool = True) -> dict[str, tuple[str, str]]:
    """`image_fault` of each image that has one. Threads help: Pillow decodes outside Python's lock."""
    ordered, found = sorted(names), {}
    with ThreadPoolExecutor(max_workers=8) as pool, progress("checking images", len(ordered)) as advance:
        reasons = pool.map(lambda name: image_fault(name, image_folder, decode), ordered)
        for name, reason in zip(ordered, reasons, strict=True):
            if reason:
                found[name] = reason
            advance(1)
    return found


def parse_row(
    row: Any, path: str, line: int, keep_keys: Collection[str] = (), taxonomy: Taxonomy = PSA
) -> tuple[list[Problem], Record | None]:
    """Validate one decoded JSON row: the problems, and the record if its fields could be read at all.

    A record comes back beside problems too, so that its images are checked in the same pass.
    """
    if not isinstance(row, dict):
        return [Problem(path, line, f"the row is a JSON {json_name(row)}; expected an object")], None
    if layout := foreign_layout(row, keep_keys):
        return [Problem(path, line, layout, layout)], None
    if foreign := foreign_taxonomy(row, taxonomy):
        return [Problem(path, line, foreign, foreign)], None
    messages: list[str] = []

    def read(reader: Any, *args: Any) -> Any:
        try:
            return reader(*args)
        except ValueError as error:
            messages.append(str(error))
            return None

    images = read(read_images, row.get("image"))
    names, glued = images or ((), False)
    safe_type = None if row.get("safe_type") is None else read(taxonomy.type_id, row["safe_type"])
    safe_level = read(read_level, row.get("safe_level"), row.get("safe_type"), taxonomy)
    if safe_type == taxonomy.harmless and safe_level:
        kind = f"{safe_type} ({taxonomy.types[safe_type]})"
        messages.append(f"safe_level is {safe_level}, but safe_type is {kind}, whose only level is 0")
    if not taxonomy.graded and safe_level == 0 and safe_type not in (taxonomy.harmless, None):
        messages.append(f"safe_level is 0, but safe_type is {safe_type} ({taxonomy.types[safe_type]}), which is a risk")
    safe_level = taxonomy.level_of(safe_type, safe_level)
    turns, faults = read_turns(row.get("conversations"))
    messages += faults
    before = len(messages)
    labels = tuple(read(read_label, name, row.get(name)) for name in LABELS)
    group = read(read_group, row.get("group"), safe_type, labels, taxonomy)
    if len(messages) == before:  # what could not be read contradicts nothing
        messages += contradictions(labels, group, safe_type, bool(names), row.get("group") is not None, taxonomy)
    texts = {name: read(read_text, name, row.get(name)) for name in ("id", "source", "split", "twin", "licence")}
    regions = read(read_regions, row.get("regions"), len(names))
    rejected = read(read_rejected, row.get("rejected"))
    extra = {name: value for name, value in row.items() if name not in FIELDS}
    problems = [Problem(path, line, message) for message in messages]
    problems += _misnamed(extra, path, line, keep_keys)
    if turns is None:
        return problems, None
    if glued and count_marks(turns) == 1:  # the official code glues both images side by side at the one mark
        turns = tuple(Turn(t.role, t.text.replace(IMAGE_MARK, f"{IMAGE_MARK}\n{IMAGE_MARK}")) for t in turns)
    if images is not None and count_marks(turns) != len(names):
        marks = f"{count_marks(turns)} {IMAGE_MARK} mark(s)"
        message = f"field image names {len(names)} image(s), but the conversation has {marks}"
        problems.append(Problem(path, line, message))
    record = Record(
        images=names,
        safe_type=safe_type,
        safe_level=safe_level,
        turns=turns,
        source_label=row.get("source_label"),
        group=group or "",
        path=path,
        line=line,
        extra=extra,
        regions=regions or (),
        rejected=rejected or (),
        taxonomy=taxonomy,
        **texts,
        **{name: label or "" for name, label in zip(LABELS, labels, strict=True)},
    )
    return problems, record


def _misnamed(keys: Iterable[str], path: str, line: int, keep_keys: Collection[str]) -> list[Problem]:
    """A problem for each key that is not ours, but easily taken for one of ours."""
    found = []
    for key in keys:
        if key not in keep_keys and (field := meant_field(key)):
            message = f"key {shorten(key)} is not read; did you mean {field}? (--keep_keys leaves it unread)"
            found.append(Problem(path, line, message, message))
    return found


def fingerprint(records: Sequence[Record]) -> str:
    """SHA-256 of what training takes from the records, in their order: images by path, labels and turns.

    A picture's own label counts where it is not the row's, a taxonomy where it is not the default.
    """
    digest = hashlib.sha256()
    for record in records:
        row: tuple[Any, ...] = (record.images, record.safe_type, record.safe_level, [tuple(t) for t in record.turns])
        if record.images and record.picture != row[1:3]:
            row += (record.picture,)
        if record.taxonomy != PSA:
            row += (record.taxonomy.hash,)
        digest.update(repr(row).encode())
    return digest.hexdigest()
