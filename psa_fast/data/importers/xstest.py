"""XSTest: harmless questions that sound harmful, and harmful ones in contrast; words alone.

`xstest_prompts.csv` (or `xstest_v2_prompts.csv`) has the columns id, prompt, type, and in newer ones label, focus and
note. A question is harmful if its type begins with `contrast_`. Questions of one focus and family are twins. There are
no answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, text_of

HELP = "XSTest's CSV of prompts"
LICENCE = "CC-BY-4.0"
SPLITS = {"test": 450}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the table's rows."""
    path = source.needed("xstest_prompts.csv", "xstest_v2_prompts.csv")
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0].split(",")
    key = "id_v2" if "id_v2" in first else "id"
    for entry in source.table_rows(path, "test", (key, "prompt", "type")):
        yield entry._replace(value=entry.value | {"key": entry.value[key]})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row without an image."""
    value = entry.value
    kind = text_of(value, "type")
    label, harmful = source.map.label(kind), kind.startswith("contrast_")
    said = value.get("label")
    if said and said != ("unsafe" if harmful else "safe"):
        raise BadRow(f"label is {said!r}, but type is {kind!r}", "label contradicts type")
    family = kind.removeprefix("contrast_")
    yield source.record(
        entry,
        text_of(value, "key"),
        text_of(value, "prompt"),
        label,
        kind,
        group="text_risk" if harmful else "text_twin",
        twin=f"xstest-{family}-{value['focus']}" if value.get("focus") else None,
    )
