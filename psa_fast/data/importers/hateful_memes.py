"""Hateful Memes: pictures with a caption in them, hateful or not.

`train.jsonl`, `dev_seen.jsonl`, `dev_unseen.jsonl`, `test_seen.jsonl` and `test_unseen.jsonl` have `{"id", "img",
"label", "text"}`, the fine-grained ones `gold_pc` too, the protected classes that are attacked. Rows without a label
stay unlabelled. The request is the picture alone; the caption is kept under `caption`. Memes of one caption are twins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, one_of, text_of
from psa_fast.data.importers.taxonomy_map import Label

HELP = "Hateful Memes' JSONL files and img/"
LICENCE = "Hateful Memes Challenge dataset licence"
SPLITS = {"train": 8500, "dev_seen": 500, "dev_unseen": 540, "test_seen": 1000, "test_unseen": 2000}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the rows of the files that are there."""
    for split, path in source.by_split({split: (f"{split}.jsonl", f"data/{split}.jsonl") for split in SPLITS}):
        yield from source.json_rows(path, split)


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row."""
    value = entry.value
    caption = text_of(value, "text")
    name, group, label = None, None, Label(None, None)
    if value.get("label") is not None:
        hateful = one_of(value, "label", (0, 1)) == 1
        classes = [c for c in value.get("gold_pc") or [] if c != "pc_empty"]
        name = ("hateful/pc" if classes else "hateful") if hateful else "not hateful"
        label, group = source.map.label(name), "risk" if hateful else "benign_twin"
    yield source.record(
        entry,
        f"{entry.split}-{value.get('id')}",
        "",
        label,
        None if name is None else {key: value[key] for key in ("label", "gold_pc") if key in value},
        source.pictures.find(value.get("img"), ("", "data")),
        group=group,
        twin="hateful_memes-" + hashlib.sha256(" ".join(caption.lower().split()).encode()).hexdigest()[:12],
        caption=caption,
    )
