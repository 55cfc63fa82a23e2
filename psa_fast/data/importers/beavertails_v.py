"""BeaverTails-V: harmful questions about images with two graded answers, in Parquet with the images inside.

`data/CATEGORY/train.parquet` and `evaluation.parquet` have the columns image, question, category, image_severity,
response_1, response_2, is_response_1_safe, is_response_2_safe and safer_response_id. The safer answer is the record's
if it is safe at all, the other one is `rejected`; where neither is safe, both are, and the answer is a refusal of ours.
`image_severity` gives the level, the category the type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, text_of
from psa_fast.data.importers.taxonomy_map import Label
from psa_fast.files import shorten

HELP = "BeaverTails-V's Parquet files, one folder a category"
LICENCE = "CC-BY-NC-4.0"
SPLITS = {"train": None, "evaluation": None}
YES = {"yes": True, "true": True, "no": False, "false": False}
COLUMNS = (
    "image", "question", "category", "image_severity", "response_1", "response_2", "is_response_1_safe",
    "is_response_2_safe", "safer_response_id",
)  # fmt: skip


def entries(source: Source) -> Iterator[Entry]:
    """Yield the tables' rows with their number in the split."""
    for entry in source.parquet_rows(COLUMNS, {split: split for split in SPLITS}):
        yield entry._replace(value=entry.value | {"key": f"{entry.split}-{source.entries[entry.split]}"})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row."""
    value = entry.value
    category, severity = text_of(value, "category"), value["image_severity"]
    label = Label(source.map.label(category).safe_type, source.map.level(severity))
    responses = [text_of(value, f"response_{number}") for number in (1, 2)]
    safe = [_yes(value, f"is_response_{number}_safe") for number in (1, 2)]
    if str(value["safer_response_id"]) not in ("1", "2"):
        raise BadRow(f"safer_response_id is {shorten(value['safer_response_id'])}; expected 1 or 2")
    better = int(value["safer_response_id"]) - 1
    answer = responses[better] if safe[better] else None
    yield source.record(
        entry,
        value["key"],
        text_of(value, "question"),
        label,
        f"{category}/{severity}",
        source.pictures.embedded(value["image"]),
        answer,
        rejected=responses if answer is None else [responses[1 - better]],
        group="risk",
    )


def _yes(value: dict[str, Any], key: str) -> bool:
    found = YES.get(str(value[key]).strip().lower())
    if found is None:
        raise BadRow(f"{key} is {shorten(value[key])}; expected yes or no")
    return found
