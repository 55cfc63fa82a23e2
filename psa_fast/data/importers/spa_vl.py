"""SPA-VL: questions about images with a chosen and a rejected answer, in Parquet with the images inside.

`data/train-*.parquet`, `validation/*.parquet`, `test/harm-*.parquet` and `test/help-*.parquet` have the columns image,
question, chosen, rejected, class1, class2 and class3; the tests have no answers. The classes are those that the image
was gathered for: of the image and of the words by themselves they say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, text_of
from psa_fast.data.importers.taxonomy_map import SAFE

HELP = "SPA-VL's Parquet files"
LICENCE = "CC-BY-4.0"
SPLITS = {"train": 93258, "validation": None, "harm": 265, "help": 265}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the tables' rows with their number in the split."""
    for entry in source.parquet_rows(("image", "question"), {split: split for split in SPLITS}):
        yield entry._replace(value=entry.value | {"key": f"{entry.split}-{source.entries[entry.split]}"})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row; the worse answer is kept as `rejected`."""
    value = entry.value
    if entry.split == "help":
        label, category, group = SAFE, "help", "benign_twin"
    else:
        classes = [text_of(value, name) for name in ("class1", "class2", "class3")]
        category, group = "/".join(classes), "risk"
        label = source.map.label(category, "/".join(classes[:2]), classes[1])
    unsaid = {} if group == "benign_twin" else {"image_label": "unknown"}
    answer = text_of(value, "chosen") if value.get("chosen") is not None else None
    rejected = None if answer is None else text_of(value, "rejected")
    yield source.record(
        entry,
        value["key"],
        text_of(value, "question"),
        label,
        category,
        source.pictures.embedded(value["image"]),
        answer,
        rejected=rejected,
        group=group,
        **unsaid,
    )
