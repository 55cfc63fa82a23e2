"""JailBreakV-28K: jailbreaks of language models carried over to models with images, and image attacks.

`JailBreakV_28K/JailBreakV_28K.csv` and `mini_JailBreakV_28K.csv`, a part of it, have the columns id, jailbreak_query,
redteam_query, format, policy, image_path, from, selected_mini and transfer_from_llm. Most images are not beside them
but behind a form. There are no answers. The formats Template, Persuade and Logic carry the harm in the words, the
others in the picture: figstep spells it out there, of the pictures of SD, SD_typo and typo alone nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, one_of, text_of

HELP = "JailBreakV-28K's CSV files and images"
LICENCE = "MIT"
SPLITS = {"JailBreakV_28K": 28000, "mini_JailBreakV_28K": 280}
IN_WORDS, IN_PICTURE = ("Template", "Persuade", "Logic"), ("figstep", "SD", "SD_typo", "typo")
COLUMNS = ("id", "jailbreak_query", "format", "policy", "image_path")


def entries(source: Source) -> Iterator[Entry]:
    """Yield the table's rows: of the whole one, unless --split names the small one, whose rows are among them."""
    asked = source.split or "JailBreakV_28K"
    for split, path in source.by_split({asked: (f"JailBreakV_28K/{asked}.csv", f"{asked}.csv")}):
        yield from source.table_rows(path, split, COLUMNS)


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row, never without its image."""
    value = entry.value
    policy, kind = text_of(value, "policy"), one_of(value, "format", (*IN_WORDS, *IN_PICTURE))
    if kind in IN_WORDS:
        labels = {"group": "text_risk", "image_label": "unknown", "text_label": "unsafe"}
    else:
        labels = {"group": "risk", "image_label": "unsafe" if kind == "figstep" else "unknown", "text_label": "safe"}
    yield source.record(
        entry,
        text_of(value, "id"),
        text_of(value, "jailbreak_query"),
        source.map.label(policy),
        f"{policy}/{kind}",
        source.pictures.find(value.get("image_path"), ("", "JailBreakV_28K")),
        joint_label="unsafe",
        **labels,
    )
