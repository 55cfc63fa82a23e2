"""Taxonomies and cross-walks as files: the shipped ones by name, others by path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_fast.files import read_yaml, shorten, shown
from psa_fast.taxonomy.heads import Taxonomy

FOLDER = Path(__file__).with_name("files")
WALKS = Path(__file__).with_name("crosswalks")
#: names of the shipped taxonomies, the default first
SHIPPED = ("psa", "holisafe-20", "llavaguard", "mlcommons")
Target = tuple[int | None, int | None]


@dataclass(frozen=True)
class CrossWalk:
    """What each type of one taxonomy is in another.

    Attributes:
        source, target: the two taxonomies.
        types: for each type of the source, by id, (type, level) of the target; a type of None has no counterpart, a
            level of None is not known.
    """

    source: Taxonomy
    target: Taxonomy
    types: tuple[Target, ...]

    def convert(self, safe_type: int | None, safe_level: int | None) -> Target:
        """(type, level) of the target for a label of the source; None where it has or knows none."""
        if safe_type is None:
            return None, None
        kind, level = self.types[safe_type]
        if kind is None:
            return None, None
        if level is None and self.source.levels == self.target.levels:
            level = safe_level
        return kind, self.target.level_of(kind, 0 if kind == self.target.harmless else level)


def read_taxonomy(name: str | Path) -> Taxonomy:
    """A shipped taxonomy by its name, or the one of a YAML file.

    Raises ValueError, naming the file, for one that is none, and for one of other classes under a shipped name.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in SHIPPED else Path(name)
    if not path.is_file():
        raise ValueError(f"taxonomy {shorten(str(name))} is neither a file nor one of: {', '.join(SHIPPED)}")
    try:
        found = Taxonomy.from_json(read_yaml(path, "taxonomy"))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"taxonomy {shown(path)}: {text}") from None
    if path.parent != FOLDER and found.name in SHIPPED and found != read_taxonomy(found.name):
        raise ValueError(f"taxonomy {shown(path)}: {found.name} is a shipped taxonomy of other classes; choose a name")
    return found


def read_crosswalk(source: Taxonomy, target: Taxonomy, path: str | Path | None = None) -> CrossWalk:
    """The cross-walk from one taxonomy to another; `path` None: the shipped one.

    Raises ValueError, naming the file and the class, unless it says of every type of the source which type of the
    target it is (null: none), and keeps harmless what is harmless and risky what is risky.
    """
    file = WALKS / f"{source.name}_to_{target.name}.yaml" if path is None else Path(path)
    if path is None and not file.is_file():
        raise ValueError(
            f"no cross-walk from {source.name} to {target.name} comes with psa-fast; give --crosswalk FILE"
        )
    value = read_yaml(file, "cross-walk")
    where = f"cross-walk {shown(file)}"
    if set(value) != {"from", "to", "types"} or not isinstance(value["types"], Mapping):
        raise ValueError(f"{where}: expected the keys from, to and types, and types to be a mapping")
    for key, taxonomy in (("from", source), ("to", target)):
        if value[key] != taxonomy.name:
            raise ValueError(f"{where}: {key} is {shorten(value[key])}; expected {taxonomy.name}")
    table = value["types"]
    unknown = [shorten(name) for name in table if name not in source.types]
    if unknown or len(table) != len(source.types):
        missing = [name for name in source.types if name not in table]
        raise ValueError(f"{where}: unknown or missing in types: {', '.join([*unknown, *missing])}")
    found = []
    for kind, name in enumerate(source.types):
        try:
            found.append(_target(target, table[name], kind == source.harmless))
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from None
    return CrossWalk(source, target, tuple(found))


def _target(taxonomy: Taxonomy, value: Any, harmless: bool) -> Target:
    """(type, level) of one entry: a type's name, [type, level], or null."""
    if value is None and not harmless:
        return None, None
    if not isinstance(value, list):
        value = [value, None]
    if len(value) != 2 or not isinstance(value[0], str):
        raise ValueError(f"{shorten(value)} is neither a type, nor [type, level], nor null")
    kind = taxonomy.type_id(value[0])
    level = None if value[1] is None else taxonomy.level_id(value[1])
    if (kind == taxonomy.harmless) != harmless:
        raise ValueError("what is harmless must stay harmless, and a risk a risk (or null)")
    if level is not None and (level == 0) != harmless:
        raise ValueError(f"level {taxonomy.levels[level]} does not belong to {taxonomy.types[kind]}")
    return kind, level
