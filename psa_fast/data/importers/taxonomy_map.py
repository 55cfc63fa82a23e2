"""A source's own categories as our types and levels: the YAML table beside an importer, or a user's in its place.

```yaml
types:
  "privacy/personal data": [privacy, medium]   # their category: our type and level, by name
  "safe/unsafe_instruction": [null, null]      # the source does not say which risk it is
levels:                                        # where the source grades severity: their grade, our level
  2: medium
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from psa_fast.data.importers import BadRow
from psa_fast.files import read_yaml, shorten, shown
from psa_fast.taxonomy import CLEAN, level_id, type_id


class Label(NamedTuple):
    """Our type and level of a category; None where the source says neither."""

    safe_type: int | None
    safe_level: int | None

    @property
    def risky(self) -> bool:
        """Whether this is a risk, of a known type or not."""
        return self.safe_type != CLEAN


SAFE = Label(CLEAN, 0)


@dataclass(frozen=True)
class TaxonomyMap:
    """A table of categories. Capitals, blanks, `-` and `_` do not tell categories apart: published spellings drift."""

    path: Path
    types: Mapping[str, Label]
    levels: Mapping[str, int]

    def label(self, *names: str) -> Label:
        """Return the label of the first of the names that the table has, the most specific one first.

        Raises:
            BadRow: it has none of them.
        """
        for name in names:
            if (label := self.types.get(_folded(name))) is not None:
                return label
        raise BadRow(f"category {shorten(names[0])} is not in {shown(self.path)}", "unknown category")

    def level(self, grade: Any) -> int:
        """Return the level of a grade. Raises BadRow for one that the table lacks."""
        if _folded(str(grade)) not in self.levels or isinstance(grade, bool):
            raise BadRow(f"grade {shorten(grade)} is not among the levels of {shown(self.path)}", "unknown grade")
        return self.levels[_folded(str(grade))]


def read_taxonomy_map(path: str | Path) -> TaxonomyMap:
    """Return the table of a YAML file.

    Raises:
        ValueError: naming file and category, for one that is no table, repeats a category, or names an unknown type
            or level.
    """
    table = read_yaml(path, "taxonomy map")
    where = f"taxonomy map {shown(path)}"
    if unknown := sorted(map(str, table.keys() - {"types", "levels"})):
        raise ValueError(f"{where}: unknown key {shorten(unknown[0])}; expected types and levels")
    parts = {}
    for key in ("types", "levels"):
        part = table.get(key) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{where}: {key} is {shorten(part)}; expected a mapping")
        parts[key] = part
    types: dict[str, Label] = {}
    levels: dict[str, int] = {}
    for name, value in parts["types"].items():
        _put(types, where, name, _label(where, name, value))
    for grade, value in parts["levels"].items():
        try:
            _put(levels, where, grade, level_id(value))
        except ValueError as error:
            raise ValueError(f"{where}: {shorten(grade)}: {error}") from None
    if not types:
        raise ValueError(f"{where}: types is empty")
    return TaxonomyMap(Path(path), types, levels)


def _label(where: str, name: Any, value: Any) -> Label:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where}: {shorten(name)} is {shorten(value)}; expected [type, level]")
    try:
        safe_type, level = value
        label = Label(None if safe_type is None else type_id(safe_type), None if level is None else level_id(level))
    except ValueError as error:
        raise ValueError(f"{where}: {shorten(name)}: {error}") from None
    if label.safe_level and label.safe_type in (None, CLEAN):
        raise ValueError(f"{where}: {shorten(name)} has a level above none, but no risk type")
    return label


def _put(found: dict[str, Any], where: str, name: Any, value: Any) -> None:
    if _folded(str(name)) in found:
        raise ValueError(f"{where}: {shorten(name)} is there twice")
    found[_folded(str(name))] = value


def _folded(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
