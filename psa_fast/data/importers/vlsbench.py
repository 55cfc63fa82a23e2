"""VLSBench: harmful images with words that give nothing away.

`data.json` (or `data/data.json`) is a list of `{"instruction_id", "instruction", "image_path", "category",
"sub_category", "source"}`; the images are in `imgs.tar`. There are no answers. The words are harmless by design.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, text_of

HELP = "VLSBench's data.json and imgs.tar"
LICENCE = "Apache-2.0"
SPLITS = {"train": 2241}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the list's rows."""
    return source.json_rows(source.needed("data.json", "data/data.json"), "train")


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row."""
    value = entry.value
    category = text_of(value, "category")
    yield source.record(
        entry,
        value.get("instruction_id"),
        text_of(value, "instruction"),
        source.map.label(category),
        f"{category}/{value.get('sub_category')}",
        source.pictures.find(value.get("image_path"), ("", "data")),
        group="risk",
        image_label="unsafe",
        text_label="safe",
        joint_label="unsafe",
    )
