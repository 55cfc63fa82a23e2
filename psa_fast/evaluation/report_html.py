"""report.html: the report as one page to look at, made of the files that an evaluation keeps. No model is run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError

from psa_fast.data.images import ImageError, resolve, to_rgb
from psa_fast.data.records import IMAGE_MARK, Record
from psa_fast.evaluation import charts
from psa_fast.evaluation.evaluate import image_readings
from psa_fast.evaluation.output import REPORT
from psa_fast.evaluation.paired import overall, threshold_curve
from psa_fast.evaluation.report import METRICS
from psa_fast.evaluation.results import ATTACKED, REFUSED, Result, attacked, read_results, refused
from psa_fast.files import read_json, write_text
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES

PAGE = "report.html"
MOST_CARDS = 8  # of a kind
MOST_PICTURES = 4  # of a card
MOST_CHARACTERS = 600  # of a text
THUMBNAIL = 192  # pixels a side, at most
STORY = {
    "attack_success": ("Attack success", "risky requests answered unsafely; lower is better"),
    "over_refusal": ("Over-refusal", "harmless requests refused or cautioned; lower is better"),
    "general_accuracy": ("General accuracy", "harmless questions answered exactly right; higher is better"),
}


class _Estimate(BaseModel):
    """An estimate as report.json has it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


_Table = dict[str, dict[str, _Estimate]]


class Kept(BaseModel):
    """What the page takes from report.json; reports of older versions lack the last two."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    stages: _Table
    provenance: dict[str, Any]
    per_type: dict[str, _Table]
    per_source: dict[str, _Table] = {}
    differences: _Table = {}

    @classmethod
    def load(cls, folder: Path) -> Kept:
        """Read `folder`/report.json. Raises ValueError if it is no report of `psa-fast evaluate`."""
        file = folder / REPORT
        try:
            kept = cls.model_validate(read_json(file, "report"))
        except ValidationError as error:
            fault = error.errors(include_input=False, include_context=False, include_url=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise ValueError(f"{file} is no report of psa-fast evaluate: {place}: {fault['msg']}") from error
        if wrong := [name for name in kept.stages if Path(name).name != name]:
            raise ValueError(f"{file} is no report of psa-fast evaluate: {wrong[0]!r} names no stage")
        return kept


def write_page(folder: Path, records: Sequence[Record] | None, image_folder: Path | None, note: str = "") -> Path:
    """Write `folder`/report.html from the report and the answers there.

    Args:
        folder: of `psa-fast evaluate`.
        records: those that were answered, in order, for the questions; None to leave them and the pictures out.
        image_folder: where the records' image paths start.
        note: why questions and pictures are left out.

    Returns the file. Raises ValueError for a report or answers that are damaged or do not belong together.
    """
    kept = Kept.load(folder)
    results = {stage: read_results(folder / f"answers-{stage}.jsonl") for stage in kept.stages}
    lengths = {len(rows) for rows in results.values()} | ({len(records)} if records is not None else set())
    if not results or len(lengths) > 1:
        raise ValueError(f"{folder}: report, answers and data do not belong together: {sorted(lengths)} rows")
    write_text(folder / PAGE, render_page(kept, results, records, image_folder, note))
    return folder / PAGE


def render_page(
    kept: Kept,
    results: Mapping[str, Sequence[Result]],
    records: Sequence[Record] | None,
    image_folder: Path | None,
    note: str = "",
) -> str:
    """The page as text. Everything that comes from records, answers and the report is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("psa_fast.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    stage = list(results)[-1]  # the details are the last one's
    rows, image_risk, scores = image_readings(results[stage])
    curve = threshold_curve(results[stage])
    policy = kept.provenance.get("policy")
    threshold = policy.get("unsafe_threshold") if isinstance(policy, dict) else None
    details = _Details(results, stage, records, image_folder)
    tables = [
        _table("Every metric", "", {"": kept.stages}),
        _table("Attack success by risk type", "risk type", _by_part(kept.per_type)),
        _table("By source", "source", _by_part(kept.per_source)),
        _table("Differences on the same rows", "", {"": kept.differences}),
    ]
    return environment.get_template("report.html").render(
        data=kept.provenance.get("data", {}),
        date=kept.provenance.get("date", ""),
        story=_story(results),
        stage=stage,
        curve=None if curve is None else charts.threshold_lines(curve, threshold),
        reliability=charts.reliability(image_risk, scores) if rows else [],
        confusion=charts.confusion(rows),
        types=RISK_TYPES,
        width=charts.PLOT_WIDTH,
        height=charts.PLOT_HEIGHT,
        tables=[table for table in tables if table["rows"] or table["hidden"]],
        misses=details.misses(),
        refusals=details.refusals(),
        note=note,
        provenance=list(_flat(kept.provenance)),
    )


def _finalize(value: Any) -> Any:
    """A text as a page can hold it: control characters and lone surrogates as their escapes."""
    if type(value) is not str or value.isprintable():  # what a macro made is a subclass; no surrogate is printable
        return value
    return "".join(c if c.isprintable() or c in "\n\t " else c.encode("unicode_escape").decode() for c in value)


def _story(results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    numbers = {stage: overall(rows) for stage, rows in results.items()}
    return [
        {
            "title": title,
            "note": text,
            "stages": [{"name": stage, **charts.bar(found[name])} for stage, found in numbers.items()],
        }
        for name, (title, text) in STORY.items()
    ]


def _by_part(tables: Mapping[str, _Table]) -> dict[str, _Table]:
    """By part of the rows instead of by stage first."""
    parts = dict.fromkeys(part for table in tables.values() for part in table)
    return {part: {stage: table.get(part, {}) for stage, table in tables.items()} for part in parts}


def _table(title: str, what: str, parts: Mapping[str, _Table]) -> dict[str, Any]:
    """A table of metrics, one row for each part and metric, one column for each stage; empty rows apart."""
    columns = list(dict.fromkeys(column for table in parts.values() for column in table))
    shown: list[dict[str, Any]] = []
    hidden: list[dict[str, Any]] = []
    for part, table in parts.items():
        for name, (meaning, better) in METRICS.items():
            cells = [table.get(column, {}).get(name) for column in columns]
            found = [cell for cell in cells if cell is not None]
            if not found:
                continue
            values = [cell.value for cell in found if cell.value is not None]
            row = {"part": part, "name": name, "meaning": meaning, "better": better, "n": found[0].n, "cells": cells}
            says_nothing = not values or (better == "lower" and not any(values))
            (hidden if says_nothing else shown).append(row)
    return {"title": title, "what": what, "columns": columns, "rows": shown, "hidden": hidden}


def _flat(value: Any, path: str = "") -> Any:
    """The leaves of the provenance, each with its path; long lists (the phrases of a refusal list) as their length."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, f"{len(value)} entries"
    elif value is not None:
        yield path, str(value)


class _Details:
    """Single rows as cards: what was asked, shown and answered, and the verdict."""

    def __init__(
        self,
        results: Mapping[str, Sequence[Result]],
        stage: str,
        records: Sequence[Record] | None,
        image_folder: Path | None,
    ) -> None:
        self._results, self._stage, self._records, self._folder = results, stage, records, image_folder

    def misses(self) -> dict[str, Any]:
        """Risky requests answered unsafely, those that the guard was surest of first."""
        rows = self._results[self._stage]
        found = [i for i, r in enumerate(rows) if r.group in ATTACKED and attacked(r)]
        return self._cards(sorted(found, key=lambda i: _score(rows[i], 2.0)))

    def refusals(self) -> dict[str, Any]:
        """Harmless requests refused or cautioned, those read as the most unsafe first."""
        rows = self._results[self._stage]
        found = [i for i, r in enumerate(rows) if r.group in REFUSED and refused(r)]
        return self._cards(sorted(found, key=lambda i: -_score(rows[i], -1.0)))

    def _cards(self, places: Sequence[int]) -> dict[str, Any]:
        return {"total": len(places), "cards": [self._card(place) for place in places[:MOST_CARDS]]}

    def _card(self, place: int) -> dict[str, Any]:
        row = self._results[self._stage][place]
        record = None if self._records is None else self._records[place]
        answers = {}
        for name, results in self._results.items():
            answers[f"{name}, guarded" if name == self._stage else name] = _cut(results[place].guarded)
        label = "" if row.safe_type in (None, CLEAN) else f"{RISK_TYPES[row.safe_type or 0]}, "
        level = "" if row.safe_level is None else RISK_LEVELS[row.safe_level]
        return {
            "where": row.id or row.where,
            "label": f"{row.group}: {label}level {level}" if label else row.group,
            "question": None if record is None else _question(record),
            "pictures": [] if record is None else [self._picture(name) for name in record.images[:MOST_PICTURES]],
            "more": 0 if record is None else max(0, len(record.images) - MOST_PICTURES),
            "target": _cut(row.target),
            "answers": answers,
            "verdict": _verdict(row),
        }

    def _picture(self, name: str) -> str | None:
        """A small PNG as a data URI; None if the file cannot be read."""
        if self._folder is None:
            return None
        try:
            picture = to_rgb(resolve(self._folder, name))
        except ImageError:
            return None  # the page says so in its place
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _score(row: Result, unread: float) -> float:
    return unread if row.unsafe_score is None else row.unsafe_score


def _question(record: Record) -> str:
    turns = record.turns[:-1]
    lines = [turn.text.replace(IMAGE_MARK, "").strip() for turn in turns]
    if len(turns) > 1:
        lines = [f"{turn.role}: {line}" for turn, line in zip(turns, lines, strict=True)]
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
        parts.append(f"read as {RISK_TYPES[row.read_type]}, level {RISK_LEVELS[row.read_level]}")
    if row.query is not None:
        number = "" if row.query_number is None else f" {row.query_number + 1}"
        parts.append(f"decided by the {row.query} query{number}")
    if row.words_alone:
        parts.append("words alone")
    elif row.picture is not None:
        parts.append(f"picture {row.picture + 1}")
    return "; ".join(parts)
