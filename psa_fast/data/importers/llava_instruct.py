"""LLaVA's instruction data: conversations about images and without them, without any safety label.

Any JSON list of `{"id", "image", "conversations"}` in LLaVA's format, whose image paths are relative to the folder, to
`images/` or to `playground/data/`; rows without an image are text alone. Ids repeat, so that a row's number is its id
here. The set is known to hold unsafe rows: it is not labelled clean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from psa_fast.data.importers.source import Entry, Source

HELP = "LLaVA-Instruct's JSON files and image folders"
LICENCE = "CC-BY-4.0"
SPLITS: Mapping[str, int | None] = {}  # each file is one, called as the file


def entries(source: Source) -> Iterator[Entry]:
    """Yield the rows of the folder's JSON files, each with its number."""
    files = sorted(source.folder.glob("*.json"))
    wanted = [path for path in files if source.wants(path.stem)]
    if not wanted:
        source.needed(f"{source.split or 'llava_instruct_150k'}.json")
    for path in wanted:
        for number, entry in enumerate(source.json_rows(path, path.stem), start=1):
            yield entry._replace(value=entry.value | {"key": f"{path.stem}-{number}"})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield the row as it is, with its image's path."""
    value = entry.value
    row = {
        "id": f"llava_instruct-{value['key']}",
        "source": "llava_instruct",
        "split": entry.split,
        "licence": LICENCE,
        "conversations": value.get("conversations"),
    }
    if value.get("image") is not None:
        row["image"] = source.pictures.find(value["image"], ("", "images", "playground/data"))
    yield row
