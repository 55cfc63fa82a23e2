"""The risk taxonomy of PSA-VLM: seven risk types, four levels (arXiv 2411.11543, section 3 and supplement, table 2)."""

from __future__ import annotations

RISK_TYPES = (
    "politics",
    "illegal risk",
    "insults and bullying",
    "fairness",
    "privacy",
    "misleading",
    "clean",
)
CLEAN = RISK_TYPES.index("clean")
RISK_LEVELS = ("none", "low", "medium", "high")
IGNORE_INDEX = -100


def type_id(value: int | str) -> int:
    """Id of a risk type given by id or name. Raises ValueError for an unknown one."""
    return _lookup(value, RISK_TYPES, "safe_type")


def level_id(value: int | str) -> int:
    """Id of a risk level given by id or name. Raises ValueError for an unknown one."""
    return _lookup(value, RISK_LEVELS, "safe_level")


def _lookup(value: int | str, names: tuple[str, ...], field: str) -> int:
    if isinstance(value, str):
        name = value.strip().lower()
        if name in names:
            return names.index(name)
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    choices = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    raise ValueError(f"{field} is {value!r:.80}; expected one of: {choices}")
