"""MOSSBench: harmless requests that models refuse because something in the picture looks harmful.

`information.json` maps an id to `{"image", "question", "metadata": {"over": "type 2", ...}}`; images/ are beside it.
There are no answers. Its 244 contrast rows, which are harmful, come in another file and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, text_of
from psa_fast.files import shorten

HELP = "MOSSBench's information.json and images"
LICENCE = None
SPLITS = {"oversensitivity": 300}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the object's entries."""
    path = source.needed("information.json", "data/information.json", "images/information.json")
    return source.json_entries(path, "oversensitivity", "key")


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row."""
    value = entry.value
    metadata = value.get("metadata")
    if not isinstance(metadata, dict):
        raise BadRow(f"metadata is {shorten(metadata)}; expected an object")
    kind = text_of(metadata, "over")
    yield source.record(
        entry,
        value["key"],
        text_of(value, "question"),
        source.map.label(kind),
        kind,
        source.pictures.find(value.get("image"), ("", "data", "images")),
        group="benign_twin",
    )
