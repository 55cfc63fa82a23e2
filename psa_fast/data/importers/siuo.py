"""SIUO (safe inputs, unsafe output): picture and words are harmless alone and harmful together.

`siuo_gen.json` is a list of `{"question_id", "image", "question", "category", "safety_warning", "reference_answer"}`;
images/ are beside it. The multiple-choice file is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, text_of

HELP = "SIUO's siuo_gen.json and images"
LICENCE = None
SPLITS = {"gen": 167}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the list's rows."""
    return source.json_rows(source.needed("siuo_gen.json", "data/siuo_gen.json"), "gen")


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row with the reference answer."""
    value = entry.value
    category = text_of(value, "category")
    yield source.record(
        entry,
        value.get("question_id"),
        text_of(value, "question"),
        source.map.label(category),
        category,
        source.pictures.find(value.get("image"), ("images", "", "data/images")),
        text_of(value, "reference_answer"),
        group="joint_risk",
    )
