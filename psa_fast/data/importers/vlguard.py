"""VLGuard: unsafe images with a question, safe images with a harmless and a harmful one, each with a safe answer.

`train.json` and `test.json` are lists of `{"id", "image", "safe", "harmful_category", "harmful_subcategory",
"instr-resp": [...]}`; an unsafe entry holds one `{"instruction", "response"}`, a safe one `{"safe_instruction",
"response"}` and `{"unsafe_instruction", "response"}`. The images are below `train/` and `test/`, or in `train.zip` and
`test.zip`. Which risk a harmful question about a safe image is, the source does not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, one_of, text_of
from psa_fast.files import shorten

HELP = "VLGuard's train.json and test.json and their images"
LICENCE = None
SPLITS = {"train": 2000, "test": 1000}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the entries of both files."""
    files = {split: (f"{split}.json", f"data/{split}.json") for split in SPLITS}
    for split, path in source.by_split(files):
        used: dict[str, list[Entry]] = {}
        for number, entry in enumerate(source.json_rows(path, split), start=1):
            # one id of the published file stands over two different entries of one image
            name = str(entry.value.get("id"))
            others = used.setdefault(name, [])
            key = f"{name}-{number}" if others else name
            if same := next((other for other in others if other.value == entry.value and not entry.error), None):
                entry = entry._replace(error=f"id {shorten(name)} was used in line {same.line}, for the same entry")
            others.append(entry)
            yield entry._replace(value=entry.value | {"key": key})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row of an unsafe entry, two twins of a safe one."""
    value = entry.value
    text_of(value, "id")
    safe = one_of(value, "safe", (True, False))
    pairs = value.get("instr-resp")
    pairs = pairs if isinstance(pairs, list) else []
    asked = ["safe_instruction", "unsafe_instruction"] if safe else ["instruction"]
    if [[name for name in asked if isinstance(pair, dict) and name in pair] for pair in pairs] != [[n] for n in asked]:
        raise BadRow(
            f"instr-resp is {shorten(value.get('instr-resp'))}; expected {' and '.join(asked)}, each with its response"
        )
    image = source.pictures.find(value.get("image"), (entry.split, ""))
    key = f"{entry.split}-{value['key']}"
    for name, pair in zip(asked, pairs, strict=True):
        words = text_of(pair, name)
        # seventeen harmless questions of the published test file have an empty answer
        answer = None if pair.get("response") == "" else text_of(pair, "response")
        if not safe:
            category = f"{text_of(value, 'harmful_category')}/{text_of(value, 'harmful_subcategory')}"
            yield source.record(entry, key, words, source.map.label(category), category, image, answer, group="risk")
            continue
        fields = {"twin": f"vlguard-{key}", "group": "benign_twin"}
        if name == "unsafe_instruction":
            fields |= {"group": "text_risk", "image_label": "safe", "text_label": "unsafe", "joint_label": "unsafe"}
        category, part = f"safe/{name}", name.removesuffix("_instruction")
        yield source.record(
            entry, f"{key}-{part}", words, source.map.label(category), category, image, answer, **fields
        )
