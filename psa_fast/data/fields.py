"""The fields of a row: each reader takes the JSON value and returns ours, or says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from psa_fast.data.labels import BENIGN_GROUPS, GROUPS, default_group
from psa_fast.files import shorten
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

IMAGE_MARK = "<image>"
SPLIT_MARK = "<split>"  # the official format's separator of two images in one path
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MAX_FAULTS = 10  # of one conversation that are listed


class Turn(NamedTuple):
    """One message; `text` holds an `<image>` mark where an image stands."""

    role: Literal["user", "assistant"]
    text: str


# left, top, right, bottom in shares of an image's width and height
Box = tuple[float, float, float, float]


def count_marks(turns: Sequence[Turn]) -> int:
    """Return how many images the turns show."""
    return sum(turn.text.count(IMAGE_MARK) for turn in turns)


def read_images(value: Any) -> tuple[tuple[str, ...], bool]:
    """Image paths, and whether they came as an official `a<split>b` pair."""
    if value is None or value == []:
        return (), False
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"field image is {shorten(value)}; expected a path or a list of paths")
    if isinstance(value, str) and SPLIT_MARK in value:
        names = [name.strip() for name in value.split(SPLIT_MARK)]
        if len(names) != 2 or not all(names):
            raise ValueError(f"field image is {shorten(value)}; expected two paths around one {SPLIT_MARK}")
        return tuple(names), True
    return tuple(names), False


def read_turns(value: Any) -> tuple[tuple[Turn, ...] | None, list[str]]:
    """Turns of the field conversations, and what is wrong with them (None if they cannot be read)."""
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else "empty" if value == [] else f"a JSON {json_name(value)}"
        return None, [f"field conversations is {found}; expected a list of user and assistant turns"]
    turns: list[Turn] = []
    faults: list[str] = []
    for index, item in enumerate(value):
        name = f"conversations[{index}]"
        if not isinstance(item, dict):
            faults.append(f"{name} is a JSON {json_name(item)}; expected an object with from and value")
            continue
        sender, text = item.get("from"), item.get("value")
        if sender is None and text is None and "role" in item:
            faults.append(f"{name} has role and content; expected from and value")
            continue
        role = ROLES.get(sender.strip().lower()) if isinstance(sender, str) else None
        if role is None:
            faults.append(f"{name}.from is {shorten(sender)}; expected user (human) or assistant (gpt)")
        if not isinstance(text, str):
            found = "missing" if text is None else f"a JSON {json_name(text)}"
            faults.append(f"{name}.value is {found}; expected text")
        if role is None or not isinstance(text, str):
            continue
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            faults.append(
                f"{name}.from is {shorten(sender)}, but turns must alternate from the user on: expected {expected}"
            )
        if not text.strip():
            needed = "an answer needs text" if role == "assistant" else "a question needs text or an image"
            faults.append(f"{name}.value is empty; {needed}")
        if role == "assistant" and IMAGE_MARK in text:
            faults.append(f"{name}.value holds an {IMAGE_MARK} mark, which only a user's turn may")
        turns.append(Turn(role, text))  # type: ignore[arg-type]
    if len(turns) == len(value) and turns[-1].role == "user":
        faults.append("conversations ends with a user's turn; expected an answer at the end")
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], f"conversations has {len(faults) - MAX_FAULTS} more faults"]
    return (tuple(turns) if len(turns) == len(value) else None), faults


def read_group(
    value: Any,
    safe_type: int | None,
    labels: tuple[str | None, ...] = (None, None, None),
    taxonomy: Taxonomy = PSA,
) -> str:
    """Return the evaluation group, checked against the type; the default one where the row names none."""
    if value is None:
        return default_group(safe_type, labels, taxonomy)
    if value not in GROUPS:
        raise ValueError(f"group is {shorten(value)}; expected one of: {', '.join(GROUPS)}")
    harmless = taxonomy.types[taxonomy.harmless]
    if value in BENIGN_GROUPS and safe_type not in (taxonomy.harmless, None):
        raise ValueError(f"group is {value!r}, but safe_type is {safe_type}, which is not {harmless}")
    if value in ("risk", "joint_risk") and safe_type == taxonomy.harmless:
        raise ValueError(f"group is {value!r}, but safe_type is {safe_type} ({harmless})")
    return str(value)


def foreign_taxonomy(row: Mapping[str, Any], wanted: Taxonomy) -> str | None:
    """Return a sentence for a row whose labels are not of the taxonomy that is read, else None.

    A row without the field `taxonomy` is of the default, for there ids alone would mean other classes elsewhere. One
    without a type has no label that could be misread.
    """
    named = row.get("taxonomy")
    if named is not None and not isinstance(named, str):
        return f"field taxonomy is {shorten(named)}; expected the name of one"
    found = named or PSA.name
    if found == wanted.name or (named is None and row.get("safe_type") is None):
        return None
    said = f"its labels are of the taxonomy {shorten(found)}" + ("" if named else ", as it names no other")
    return f"{said}, what is read here of {wanted.name!r}: --taxonomy, or `psa-fast data convert` first"


def read_level(value: Any, row_type: Any, taxonomy: Taxonomy = PSA) -> int | None:
    """Return the level's id, checked against the row's value of safe_type: a level is a level of some risk."""
    if value is None:
        return None
    level = taxonomy.level_id(value)
    if level and row_type is None:
        raise ValueError(f"safe_level is {level}, but the row has no safe_type")
    return level


def read_text(name: str, value: Any) -> str | None:
    """Return a text field as it is; an id may be a whole number too."""
    if value is None or isinstance(value, str):
        return value
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"field {name} is {shorten(value)}; expected text")


def read_regions(value: Any, images: int) -> tuple[Box | None, ...]:
    """Return what part of each image the label rests on: as many boxes (or None) as images, or nothing."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != images or not all(box is None or _is_box(box) for box in value):
        raise ValueError(
            f"field regions is {shorten(value)}; expected for each of {images} image(s) null or [left, top, right, "
            f"bottom] in shares of its width and height"
        )
    return tuple(None if box is None else tuple(map(float, box)) for box in value)  # type: ignore[misc]


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4 or any(isinstance(v, bool) for v in box):
        return False
    if not all(isinstance(v, int | float) and 0 <= v <= 1 for v in box):
        return False
    return bool(box[0] < box[2] and box[1] < box[3])


def read_rejected(value: Any) -> tuple[str, ...]:
    """Return the answers that were judged worse than the conversation's last one: one text, or a list of them."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"field rejected is {shorten(value)}; expected an answer or a list of answers")
    return tuple(texts)


def json_name(value: Any) -> str:
    """Return what JSON calls the kind of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
