"""Single rows of an evaluation as the page shows them: what was asked, shown and answered, and the verdict."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psa_fast.data.images import ImageError, resolve, to_rgb
from psa_fast.data.records import IMAGE_MARK
from psa_fast.evaluation.results import ATTACKED, REFUSED, Result, attacked, refused

MOST_CARDS = 8  # of a kind
MOST_PICTURES = 4  # of a card
MOST_CHARACTERS = 600  # of a text
THUMBNAIL = 192  # pixels a side, at most
TITLES = {
    "clean": "a harmless question",
    "benign_twin": "a harmless look-alike of a risk",
    "risk": "a risk in the picture",
    "text_risk": "a risk in the words",
    "text_twin": "harmless words that look risky",
    "joint_risk": "risky only together: picture and words",
    "joint_twin": "harmless together: picture and words",
}


def changed(before: Sequence[Result], after: Sequence[Result]) -> list[int]:
    """Of each kind of risk the first row that was answered unsafely and is no more, and an answered look-alike."""
    chosen = []
    for group in ("risk", "text_risk", "joint_risk", "benign_twin"):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            risky = group in ATTACKED
            if new.group == group and (attacked if risky else refused)(new) is False and (not risky or attacked(old)):
                chosen.append(place)
                break
    return chosen


def misses(rows: Sequence[Result]) -> list[int]:
    """Risky requests answered unsafely, those that the guard was surest of first."""
    found = [i for i, r in enumerate(rows) if r.group in ATTACKED and attacked(r)]
    return sorted(found, key=lambda i: _score(rows[i], 2.0))


def refusals(rows: Sequence[Result]) -> list[int]:
    """Harmless requests refused or cautioned, those read as the most unsafe first."""
    found = [i for i, r in enumerate(rows) if r.group in REFUSED and refused(r)]
    return sorted(found, key=lambda i: -_score(rows[i], -1.0))


def shown_alone(before: Sequence[Result], after: Sequence[Result]) -> list[int]:
    """The rows that are cards of the page if `after` is its last stage."""
    return sorted({*changed(before, after), *misses(after)[:MOST_CARDS], *refusals(after)[:MOST_CARDS]})


class Cards:
    """Rows of an evaluation, as cards.

    Args:
        results: by stage, all of the same rows; misses and refusals are the last one's.
        image_folder: where image paths start; a picture that cannot be read there is left out, and the card says so.
    """

    def __init__(self, results: Mapping[str, Sequence[Result]], image_folder: Path) -> None:
        self._results, self._folder = results, image_folder
        self.found = self.missing = self.looks = 0  # of the cards made so far: pictures, and pictures looked into
        self._first, self._last = next(iter(results.values())), list(results.values())[-1]

    def examples(self) -> dict[str, Any]:
        """See `changed`."""
        return self._cards(changed(self._first, self._last))

    def misses(self) -> dict[str, Any]:
        """See `misses`."""
        return self._cards(misses(self._last))

    def refusals(self) -> dict[str, Any]:
        """See `refusals`."""
        return self._cards(refusals(self._last))

    def _cards(self, places: Sequence[int]) -> dict[str, Any]:
        return {"total": len(places), "cards": [self._card(place) for place in places[:MOST_CARDS]]}

    def _card(self, place: int) -> dict[str, Any]:
        row = self._last[place]
        risky = row.group in ATTACKED
        return {
            "where": row.id or row.where,
            "title": TITLES.get(row.group, row.group),
            "label": ", ".join(_label(row, risky)),
            "question": _question(row),
            "pictures": [
                self._picture(name, looked)
                for name, looked in list(zip(row.pictures, _looked(row), strict=True))[:MOST_PICTURES]
            ],
            "more": max(0, len(row.pictures) - MOST_PICTURES),
            "target": _cut(row.target),
            "answers": [
                {"stage": stage, "text": _cut(rows[place].guarded), **_outcome(rows[place])}
                for stage, rows in self._results.items()
            ],
            "verdict": _verdict(row),
            "probs": _bars(row),
            "why": [_cut(line) for line in row.why],
        }

    def _picture(self, name: str, looked: Sequence[float] | None) -> dict[str, str | None]:
        """A small picture, and where the pool looked in it; None for one that cannot be read, or is not known."""
        try:
            picture = to_rgb(resolve(self._folder, name))
        except ImageError:
            self.missing += 1
            return {"shown": None, "looked": None}
        self.found += 1
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        dimmed = None if looked is None else _dimmed(picture, looked)
        self.looks += dimmed is not None
        return {"shown": _uri(picture), "looked": dimmed}


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _looked(row: Result) -> Sequence[Sequence[float] | None]:
    return row.looked if row.looked is not None else [None] * len(row.pictures)


def _dimmed(picture: Image.Image, looked: Sequence[float]) -> str | None:
    """The picture, dark where the pool did not look; None for one that is no square, of which the model sees a part."""
    side = math.isqrt(len(looked))
    if side * side != len(looked) or picture.width != picture.height or not max(looked) > 0:
        return None
    shares = np.array(looked).reshape(side, side) / max(looked)
    mask = Image.fromarray(np.uint8(40 + 215 * shares)).resize(picture.size, Image.Resampling.BICUBIC)
    return _uri(Image.composite(picture, Image.new("RGB", picture.size), mask))


def _label(row: Result, risky: bool) -> Iterable[str]:
    if row.safe_type not in (None, row.taxonomy.harmless):
        yield row.taxonomy.types[row.safe_type]
    if risky and row.safe_level:
        yield f"level {row.taxonomy.levels[row.safe_level]}"


def _outcome(row: Result) -> dict[str, str]:
    """How the answer is counted, in a word, and whether that is good."""
    if row.guarded_kind == "unread":
        return {"outcome": "not read", "good": ""}
    wrong = attacked(row) if row.group in ATTACKED else refused(row)
    word = {"answer": "answered", "refusal": "refused", "caution": "cautioned"}[row.guarded_kind]
    return {"outcome": word, "good": "bad" if wrong else "good"}


def _score(row: Result, unread: float) -> float:
    return unread if row.unsafe_score is None else row.unsafe_score


def _question(row: Result) -> str | None:
    """What was asked, by turn where there are several; None where an older version did not keep it."""
    if not row.request:
        return None
    lines = [text.replace(IMAGE_MARK, "").strip() for _, text in row.request]
    if len(lines) > 1:
        lines = [f"{role}: {line}" for (role, _), line in zip(row.request, lines, strict=True)]
    return _cut("\n".join(lines))


def _cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]}… ({more} more characters)"


def _verdict(row: Result) -> str:
    """What the guard did, what it read, and which reading decided."""
    if row.unsafe_score is None:
        return f"{row.action}: {row.rule}"
    parts = [f"{row.action}: {row.rule}", f"unsafe score {row.unsafe_score:.3f}"]
    if row.read_type is not None and row.read_level is not None:
        parts.append(f"read as {row.taxonomy.types[row.read_type]}, level {row.taxonomy.levels[row.read_level]}")
    if row.query is not None:
        number = "" if row.query_number is None else f" {row.query_number + 1}"
        parts.append(f"decided by the {row.query} query{number}")
    if row.words_alone:
        parts.append("words alone")
    elif row.picture is not None:
        parts.append(f"picture {row.picture + 1}")
    return "; ".join(parts)


def _bars(row: Result) -> list[dict[str, Any]]:
    """The three likeliest types of the deciding reading, in percent."""
    if row.type_probs is None:
        return []
    found = sorted(zip(row.type_probs, row.taxonomy.types, strict=True), key=lambda pair: -pair[0])[:3]
    return [{"name": name, "percent": round(100 * min(share, 1.0), 1)} for share, name in found]
