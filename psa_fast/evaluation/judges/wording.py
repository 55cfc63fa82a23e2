"""The wording of a question to a judging model: shipped, or from a YAML file, filled in without reading the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from psa_fast.evaluation.judges.contract import Answered, Prompt
from psa_fast.files import read_yaml, shown

_PLACES = re.compile(r"\{(request|answer|label)\}")


def read_wording(path: str | Path) -> dict[str, str]:
    """A wording from a YAML file: `user` and perhaps `system`, or `text` alone.

    Raises ValueError, naming the file, for other keys, for what is no text, and if request or answer stand nowhere.
    """
    found = read_yaml(path, "judge template")
    if set(found) not in ({"user"}, {"user", "system"}, {"text"}):
        raise ValueError(f"judge template {shown(path)}: expected the keys user and perhaps system, or text alone")
    if not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"judge template {shown(path)}: every key must hold a text")
    places = set(_PLACES.findall("".join(found.values())))
    if missing := sorted({"request", "answer"} - places):
        raise ValueError(
            f"judge template {shown(path)}: {{{missing[0]}}} stands nowhere, so the judge would not see it"
        )
    return found


def fill(wording: Mapping[str, str], answered: Answered) -> Prompt:
    """The prompt of a wording. What is filled in is not searched for places again."""
    values = {
        "request": answered.question,
        "answer": answered.answer,
        "label": "unsafe" if answered.risky else "safe",
    }
    texts = {key: _PLACES.sub(lambda place: values[place[1]], text) for key, text in wording.items()}
    if "text" in texts:
        return Prompt(text=texts["text"])
    return Prompt(tuple({"role": key, "content": texts[key]} for key in ("system", "user") if key in texts))
