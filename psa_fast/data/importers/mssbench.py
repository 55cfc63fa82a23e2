"""MSSBench: one request with two images, harmless before one of them and harmful before the other.

`combined.json` holds `{"chat": [{"safe_image_path", "unsafe_image_path", "Type", "queries"}], "embodied": [{"safe",
"unsafe", "category", "safe_instructions", "unsafe_instructions"}]}`, the images are below `chat/` and `embodied/`. The
parts are the splits. There are no answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, text_of
from psa_fast.data.importers.taxonomy_map import SAFE
from psa_fast.data.rows import read_entries
from psa_fast.files import shorten

HELP = "MSSBench's combined.json and images"
LICENCE = "MIT"
SPLITS = {"chat": None, "embodied": None}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the items of both lists; the line is that of their list."""
    path = source.needed("combined.json", "combine.json")
    for split, (line, items, error) in read_entries(path, HELP):
        if error is None and (split not in SPLITS or not isinstance(items, list)):
            error = f"{shorten(split)} is {shorten(items)}; expected lists under {' and '.join(SPLITS)}"
        if error is not None:
            yield Entry(str(path), line, split, {}, error)
        elif source.wants(split):
            for number, item in enumerate(items, start=1):
                wrong = None if isinstance(item, dict) else f"{split}[{number - 1}] is {shorten(item)}"
                yield Entry(str(path), line, split, {} if wrong else {**item, "key": f"{split}-{number}"}, wrong)


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield both rows of each query: twins of which one is a risk, of picture and words together."""
    value, chat = entry.value, entry.split == "chat"
    category = text_of(value, "Type" if chat else "category")
    label = source.map.label(category)
    if chat:
        asked = dict.fromkeys(("safe", "unsafe"), _texts(value, "queries"))
    else:
        asked = {name: _texts(value, f"{name}_instruction") for name in ("safe", "unsafe")}
        if len(asked["safe"]) != len(asked["unsafe"]):
            raise BadRow(f"{len(asked['safe'])} safe and {len(asked['unsafe'])} unsafe instructions; expected pairs")
    images = {
        name: source.pictures.find(value.get(f"{name}_image_path" if chat else name), (entry.split, ""))
        for name in asked
    }
    for number in range(len(asked["safe"])):
        for name in ("safe", "unsafe"):
            yield source.record(
                entry,
                f"{value['key']}-{number + 1}-{name}",
                asked[name][number],
                label if name == "unsafe" else SAFE,
                f"{category}/{name}",
                images[name],
                twin=f"mssbench-{value['key']}-{number + 1}",
                group="joint_risk" if name == "unsafe" else "joint_twin",
            )


def _texts(value: dict[str, Any], key: str) -> list[str]:
    """The texts of a key, or of its plural, which holds variants of the one."""
    texts = value.get(f"{key}s", value.get(key))
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow(f"{key} is {shorten(texts)}; expected a list of texts")
    return texts
