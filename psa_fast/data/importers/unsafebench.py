"""UnsafeBench: images alone, judged safe or unsafe, in Parquet with the images inside.

The columns are image, safety_label (Safe, Unsafe), category and source. The category is what was searched for: a safe
image has one too. There are no words and no answers: the request is the image alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, one_of, text_of
from psa_fast.data.importers.taxonomy_map import SAFE

HELP = "UnsafeBench's Parquet files"
LICENCE = None
SPLITS = {"train": 8109, "test": 2037}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the tables' rows with their number in the split."""
    for entry in source.parquet_rows(("image", "safety_label", "category"), {split: split for split in SPLITS}):
        yield entry._replace(value=entry.value | {"key": f"{entry.split}-{source.entries[entry.split]}"})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row; safe images are look-alikes of the category that they were found under."""
    value = entry.value
    category, verdict = text_of(value, "category"), one_of(value, "safety_label", ("Safe", "Unsafe"))
    label = source.map.label(category)  # a category that is not known is an error of safe rows too
    yield source.record(
        entry,
        value["key"],
        "",
        label if verdict == "Unsafe" else SAFE,
        f"{category}/{verdict}",
        source.pictures.embedded(value["image"]),
        group="risk" if verdict == "Unsafe" else "benign_twin",
    )
