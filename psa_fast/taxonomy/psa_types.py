"""The risk taxonomy of PSA-VLM: seven risk types, four levels (arXiv 2411.11543, section 3 and supplement, table 2)."""

from __future__ import annotations

from psa_fast.taxonomy.heads import Taxonomy

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
PSA = Taxonomy("psa", RISK_TYPES, CLEAN, RISK_LEVELS)


def type_id(value: int | str) -> int:
    """Id of a risk type given by id or name. Raises ValueError for an unknown one."""
    return PSA.type_id(value)


def level_id(value: int | str) -> int:
    """Id of a risk level given by id or name. Raises ValueError for an unknown one."""
    return PSA.level_id(value)
