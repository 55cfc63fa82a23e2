"""HoliSafe-Bench: every combination of a safe or unsafe image with safe or unsafe words that there can be.

`holisafe_bench.json` is a list of `{"id", "image", "query", "type", "category", "subcategory", "image_safe",
"image_safety_label"}`. The letters of `type` are the image, the words and both together: S safe, U unsafe. There are no
answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, one_of, text_of
from psa_fast.data.importers.taxonomy_map import SAFE

HELP = "HoliSafe-Bench's holisafe_bench.json and images"
LICENCE = "CC-BY-NC"
SPLITS = {"test": 4031}
GROUPS = {"SSS": "benign_twin", "SSU": "joint_risk", "USU": "risk", "UUU": "risk", "SUU": "text_risk"}
VERDICTS = {"S": "safe", "U": "unsafe"}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the list's rows."""
    return source.json_rows(source.needed("holisafe_bench.json"), "test")


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row with the three labels that `type` spells."""
    value = entry.value
    kind = one_of(value, "type", tuple(GROUPS))
    image_label, text_label, joint_label = (VERDICTS[letter] for letter in kind)
    if "image_safe" in value and one_of(value, "image_safe", (True, False)) != (image_label == "safe"):
        raise BadRow(f"image_safe is {value['image_safe']}, but type is {kind!r}", "image_safe contradicts type")
    subcategory = text_of(value, "subcategory")
    label = source.map.label(subcategory) if joint_label == "unsafe" else SAFE
    yield source.record(
        entry,
        value.get("id"),
        text_of(value, "query"),
        label,
        f"{kind}/{value.get('category')}/{subcategory}",
        source.pictures.find(value.get("image"), ("", "images")),
        group=GROUPS[kind],
        image_label=image_label,
        text_label=text_label,
        joint_label=joint_label,
    )
