"""The keys of a row that are not ours: those that look like ours, and the layouts of well-known datasets."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

FIELDS = (
    "image", "safe_type", "safe_level", "conversations", "id", "source", "source_label", "split", "group",
    "image_label", "text_label", "joint_label", "regions", "twin", "licence", "rejected", "taxonomy",
)  # fmt: skip

TEMPLATE = "answer_from"  # key of a record whose answer is a sentence of ours, with the value "template"

# what others call what we read; a row that has one means something that we would not see
_OTHER_NAMES = {
    "image": "images img imgs image_path image_paths image_file image_files image_name file_name filename picture",
    "safe_type": "label labels type types risk_type risk_types safety_type safety_label safe unsafe is_safe",
    "safe_level": "level levels risk_level safety_level",
    "conversations": "conversation messages system prompt dialog dialogue turns",
}
_MEANT = {name: field for field, names in _OTHER_NAMES.items() for name in names.split()}
# a letter too many or too few in these changes what is trained or measured
_CHECKED_SPELLING = (
    "image", "safe_type", "safe_level", "conversations", "group", "image_label", "text_label", "joint_label",
    "taxonomy",
)  # fmt: skip

_CONVERT = 'turn it into records first (docs/data.md, "Your own data")'
# (keys that it has, what it is, what to do), the first that fits
_LAYOUTS = (
    ({"instr-resp"}, "VLGuard's own format", "`psa-fast data import vlguard` reads it"),
    ({"safe", "conversations"}, "VLGuard in LLaVA's format", "its labels are not read, safe_type and safe_level are"),
    ({"img", "text"}, "the Hateful Memes format", "`psa-fast data import hateful_memes` reads it"),
    ({"messages"}, "a chat dataset with messages", _CONVERT),
    ({"chosen", "rejected"}, "preference pairs", _CONVERT),
    ({"image_path", "question"}, "a test file of the official PSA-VLM", "`psa-fast data import psa` reads it"),
    ({"instruction", "output"}, "the Alpaca format", _CONVERT),
)


def foreign_layout(row: Mapping[str, Any], keep: Collection[str] = ()) -> str | None:
    """Return a sentence for a row that is laid out as a well-known dataset and not as ours, else None.

    Args:
        row: the decoded row.
        keep: keys that say nothing about the layout.
    """
    if "safe_type" in row and "conversations" in row:
        return None
    for keys, name, advice in _LAYOUTS:
        if keys <= row.keys() and not keys & set(keep):
            return f"this looks like {name}: {advice}"
    return None


@lru_cache(maxsize=4096)
def meant_field(key: str) -> str | None:
    """Return the field of ours that a foreign key is easily taken for, None for a key that says something else."""
    # a zero-width character or a full-width letter makes another key that looks the same
    seen = (c for c in unicodedata.normalize("NFKC", key) if unicodedata.category(c) not in ("Cf", "Cc"))
    plain = "".join(seen).strip().lower().replace("-", "_").replace(" ", "_")
    if plain in _MEANT:
        return _MEANT[plain]
    squeezed = plain.replace("_", "")
    for field in FIELDS:
        if squeezed == field.replace("_", ""):
            return field
    close = difflib.get_close_matches(plain[:40], _CHECKED_SPELLING, n=1, cutoff=0.85)
    return close[0] if close else None
