"""The value of a taxonomy: what the two heads of the concept bottleneck tell apart, and which class is harmless."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1  # of the file's format
UNGRADED = ("none", "risky")
MAX_CLASSES = 256  # of one head
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Taxonomy:
    """Risk types, one of which is harmless, and risk levels from harmless to worst.

    Attributes:
        name: what records call it; other classes are another name.
        types: names of the types, in the order of the type head's rows; their ids are their places.
        harmless: id of the harmless type.
        levels: names of the levels, in the order of the level head's rows. The first is harmless, the last the worst.
            A taxonomy that grades no risk has UNGRADED: the level then follows from the type.

    Raises ValueError, as one sentence, for what is no taxonomy.
    """

    name: str
    types: tuple[str, ...]
    harmless: int
    levels: tuple[str, ...] = UNGRADED

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"name is {self.name!r:.80}; expected lower-case letters, digits, '.', '_' and '-'")
        for head, names in (("type", self.types), ("level", self.levels)):
            _check_classes(head, names)
        if type(self.harmless) is not int or not 0 <= self.harmless < len(self.types):
            raise ValueError(f"harmless is {self.harmless!r:.80}; expected the id of a type")

    @property
    def graded(self) -> bool:
        """Whether risks have levels of their own."""
        return self.levels != UNGRADED

    @property
    def risks(self) -> tuple[str, ...]:
        """Names of all types but the harmless one, in the order of their ids."""
        return tuple(name for i, name in enumerate(self.types) if i != self.harmless)

    @property
    def cautioned(self) -> int | None:
        """Id of the level at which a caution is a safe answer: the lowest of several; None where there is but one."""
        return 1 if len(self.levels) > 2 else None

    @property
    def hash(self) -> str:
        """SHA-256 of name and classes: comments and order of keys of its file do not change it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def type_id(self, value: int | str) -> int:
        """Id of a type given by id or name. Raises ValueError for an unknown one."""
        return _lookup(value, self.types, "safe_type")

    def level_id(self, value: int | str) -> int:
        """Id of a level given by id or name. Raises ValueError for an unknown one."""
        return _lookup(value, self.levels, "safe_level")

    def level_of(self, safe_type: int | None, safe_level: int | None) -> int | None:
        """The level of a type: the given one, or what follows from the type where risks are not graded."""
        if self.graded or safe_level is not None or safe_type is None:
            return safe_level
        return int(safe_type != self.harmless)

    def to_json(self) -> dict[str, Any]:
        """What a file holds of it."""
        heads: dict[str, Any] = {"type": {"harmless": self.types[self.harmless], "classes": list(self.types)}}
        if self.graded:
            heads["level"] = {"harmless": self.levels[0], "classes": list(self.levels)}
        return {"version": VERSION, "name": self.name, "heads": heads}

    @classmethod
    def from_json(cls, value: Any) -> Taxonomy:
        """The taxonomy that a file's mapping says. Raises ValueError, as one sentence, for anything else."""
        _keys("the file", value, ("version", "name", "heads"))
        if type(value["version"]) is not int or value["version"] != VERSION:
            raise ValueError(f"version is {value['version']!r:.80}; this program reads version {VERSION}")
        heads = value["heads"]
        _keys("heads", heads, ("type",), ("level",))
        found = {}
        for head, part in heads.items():
            _keys(f"heads.{head}", part, ("harmless", "classes"))
            _check_classes(head, part["classes"])
            if part["harmless"] not in part["classes"]:
                raise ValueError(f"heads.{head}: harmless is {part['harmless']!r:.80}; expected one of its classes")
            found[head] = tuple(part["classes"]), part["classes"].index(part["harmless"])
        types, harmless = found["type"]
        levels, first = found.get("level", (UNGRADED, 0))
        if first:
            raise ValueError("heads.level: the harmless class must come first, the worst last")
        return cls(value["name"], types, harmless, levels)


CONVERT = "`psa-fast data convert` makes records of one taxonomy into records of another"


def require_same(wanted: Taxonomy, found: Taxonomy, whose: str, others: str, advice: str = CONVERT) -> None:
    """Raise ValueError, with what to do, where two things are of different taxonomies.

    Args:
        wanted: the taxonomy of `whose`.
        found: that of `others`.
        whose: in words, as "the add-on runs/stage1".
        others: in words, as "the policy mine.yaml".
        advice: what mends it.
    """
    if wanted == found:
        return
    if wanted.name == found.name:
        raise ValueError(
            f"{whose} and {others} are of two taxonomies called {wanted.name}, whose classes differ "
            f"({wanted.hash[:12]} and {found.hash[:12]}); give the file that both were made with"
        )
    raise ValueError(f"{whose} is of the taxonomy {wanted.name}, {others} of {found.name}: {advice}")


def _check_classes(head: str, names: Any) -> None:
    if not isinstance(names, Sequence) or isinstance(names, str) or not 2 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"heads.{head}: classes is {names!r:.80}; expected 2 to {MAX_CLASSES} names")
    seen = set()
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 80 or name != name.strip():
            raise ValueError(f"heads.{head}: {name!r:.80} is no name of a class")
        if name != name.lower() or name.isdigit() or set(name) & set("{}"):
            raise ValueError(f"heads.{head}: {name!r:.80} must be lower case, without braces, and no number")
        if name in seen:
            raise ValueError(f"heads.{head}: {name!r:.80} stands there twice")
        seen.add(name)


def _keys(where: str, value: Any, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r:.80}; expected the keys {', '.join(needed)}")
    if wrong := [key for key in value if key not in (*needed, *optional)]:
        raise ValueError(f"{where}: unknown key {wrong[0]!r:.80}; expected {', '.join((*needed, *optional))}")
    if missing := [key for key in needed if key not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _lookup(value: int | str, names: tuple[str, ...], field: str) -> int:
    if isinstance(value, str):
        name = value.strip().lower()
        if name in names:
            return names.index(name)
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    choices = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    raise ValueError(f"{field} is {value!r:.80}; expected one of: {choices}")
