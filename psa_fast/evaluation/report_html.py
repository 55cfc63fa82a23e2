"""report.html: the report as one page to look at, made of the files that an evaluation keeps. No model is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError

from psa_fast.evaluation import charts
from psa_fast.evaluation.cards import Cards
from psa_fast.evaluation.evaluate import image_readings
from psa_fast.evaluation.output import REPORT
from psa_fast.evaluation.paired import overall, threshold_curve
from psa_fast.evaluation.report import NO_GROUP, ROWS, meaning, says_nothing
from psa_fast.evaluation.results import Result, read_results, taxonomy_of
from psa_fast.files import read_json, write_text
from psa_fast.taxonomy.heads import Taxonomy

PAGE = "report.html"
STORY = {
    "attack_success": ("Attack success", "risky requests answered unsafely; lower is better"),
    "over_refusal": ("Over-refusal", "harmless requests refused or answered with a caution; lower is better"),
    "general_accuracy": ("General accuracy", "harmless questions answered exactly right; higher is better"),
}
_Results = Mapping[str, Sequence[Result]]


class _Estimate(BaseModel):
    """An estimate as report.json has it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


_Table = dict[str, dict[str, _Estimate]]


class _Data(BaseModel):
    """What was evaluated."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    path: str = "unnamed data"
    rows: int = 0
    rows_in_file: int = 0
    groups: dict[str, int] = {}


class _Provenance(BaseModel):
    """What the page says of it beside showing all."""

    model_config = ConfigDict(extra="allow", frozen=True)

    data: _Data = _Data()
    date: str = ""
    policy: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    decoding: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}


class Kept(BaseModel):
    """What the page takes from report.json; those of older versions lack the last tables."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    stages: _Table
    provenance: _Provenance
    per_type: dict[str, _Table]
    per_source: dict[str, _Table] = {}
    without_source: dict[str, _Table] = {}
    differences: _Table = {}
    interventions: dict[str, _Table] = {}

    @classmethod
    def load(cls, folder: Path) -> tuple[Kept, Any]:
        """Read `folder`/report.json: what the page takes, and its whole provenance.

        Raises ValueError if it is no report of `psa-fast evaluate`.
        """
        file = folder / REPORT
        content = read_json(file, "report")
        try:
            kept = cls.model_validate(content)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_context=False, include_url=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise ValueError(f"{file} is no report of psa-fast evaluate: {place}: {fault['msg']}") from error
        if wrong := [name for name in kept.stages if Path(name).name != name]:
            raise ValueError(f"{file} is no report of psa-fast evaluate: {wrong[0]!r} names no stage")
        return kept, content["provenance"]


class Written(NamedTuple):
    """A page that was written: the file, where its pictures were looked for, and how many were found and were not."""

    path: Path
    image_folder: Path
    found: int
    missing: int


def write_page(folder: Path, image_folder: Path | None = None) -> Written:
    """Write `folder`/report.html from the report and the answers there.

    Args:
        folder: of `psa-fast evaluate`.
        image_folder: where image paths start; None: where the evaluation found them.

    Raises ValueError for a report or answers that are damaged or do not belong together.
    """
    kept, provenance = Kept.load(folder)
    if kept.provenance.settings.get("concepts_only"):
        raise ValueError(f"{folder}: its evaluation answered nothing (--concepts_only), and the page is about answers")
    results = {stage: read_results(folder / f"answers-{stage}.jsonl") for stage in kept.stages}
    asked = {tuple((r.where, r.target) for r in rows) for rows in results.values()}
    if len(asked) != 1 or not all(results.values()):
        raise ValueError(f"{folder}: the answers of the stages are not to the same requests; evaluate once more")
    if image_folder is None:
        given = kept.provenance.settings.get("image_folder")
        image_folder = Path(given) if isinstance(given, str) else Path(kept.provenance.data.path).parent
    cards = Cards(results, image_folder)
    write_text(folder / PAGE, render_page(kept, provenance, results, cards))
    return Written(folder / PAGE, image_folder, cards.found, cards.missing)


def render_page(kept: Kept, provenance: Any, results: _Results, cards: Cards) -> str:
    """The page as text. Everything that comes from records, answers and the report is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("psa_fast.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    stage = list(results)[-1]  # the single rows are the last one's
    chosen = {"examples": cards.examples(), "misses": cards.misses(), "refusals": cards.refusals()}
    story = {name: overall(rows) for name, rows in results.items()}
    taxonomy = taxonomy_of([result for rows in results.values() for result in rows])
    told = [
        ("Every metric", "", {"": kept.stages}, kept.stages),
        ("Differences on the same rows", "", {"": kept.differences}, kept.stages),
        ("Attack success by risk type", "risk type", _by_part(kept.per_type), None),
        ("By source", "source", _by_part(kept.per_source), None),
        ("With one source left out", "without", _by_part(kept.without_source), None),
        ("Interventions: a concept forced or cleared by hand", "concept", _by_part(kept.interventions), None),
    ]
    tables = [_table(*parts, taxonomy) for parts in told]
    return environment.get_template("report.html").render(
        data=kept.provenance.data,
        unlabelled=kept.provenance.data.groups.get(NO_GROUP, 0),
        date=kept.provenance.date,
        stages=list(results),
        stage=stage,
        story=[
            {"title": title, "note": text, "stages": [{"name": s, **charts.bar(story[s][name])} for s in results]}
            for name, (title, text) in STORY.items()
        ],
        short={name: {s: charts.percent(story[s][name]) for s in results} for name in STORY},
        rows={name: story[stage][name].n for name in STORY},
        times=list(_times(kept.provenance, results)),
        heads=_heads(results, kept.provenance.policy.get("unsafe_threshold")),
        taxonomy=taxonomy,
        width=charts.PLOT_WIDTH,
        height=charts.PLOT_HEIGHT,
        tables=[table for table in tables if table["rows"] or table["hidden"]],
        **chosen,
        looks=cards.looks,
        provenance=list(_flat(provenance)),
    )


def _finalize(value: Any) -> Any:
    """A text as a page can hold it: control characters and lone surrogates as their escapes."""
    if type(value) is not str or value.isprintable():  # what a macro made is a subclass; no surrogate is printable
        return value
    return "".join(c if c.isprintable() or c in "\n\t " else c.encode("unicode_escape").decode() for c in value)


def _times(provenance: _Provenance, results: _Results) -> Iterator[dict[str, Any]]:
    """How long the batches of a stage took, where the report says so."""
    for stage in results:
        found = provenance.stages.get(stage, {}).get("batch_seconds")
        if isinstance(found, dict) and all(isinstance(found.get(key), int | float) for key in ("p50", "p95")):
            yield {
                "stage": stage,
                "p50": found["p50"],
                "p95": found["p95"],
                "size": provenance.decoding.get("batch_size"),
            }


def _heads(results: _Results, threshold: Any) -> list[dict[str, Any]]:
    """The pictures of each stage's concept head; stages with the same head share them."""
    heads: list[dict[str, Any]] = []
    marked = threshold if isinstance(threshold, float) and 0.0 < threshold <= 1.0 else None
    for stage, found in results.items():
        rows, image_risk, scores = image_readings(found)
        curve = threshold_curve(found)
        head = {
            "curve": None if curve is None else charts.threshold_lines(curve, marked),
            "reliability": charts.reliability_points(image_risk, scores) if rows else [],
            "confusion": charts.confusion(rows),
        }
        same = [other for other in heads if all(other[key] == head[key] for key in head)]
        if same:
            same[0]["stages"].append(stage)
        elif any(head.values()):
            heads.append({"stages": [stage], **head})
    return heads


def _by_part(tables: Mapping[str, _Table]) -> dict[str, _Table]:
    """By part of the rows instead of by stage first."""
    parts = dict.fromkeys(part for table in tables.values() for part in table)
    return {part: {stage: table.get(part, {}) for stage, table in tables.items()} for part in parts}


def _table(
    title: str, what: str, parts: Mapping[str, _Table], whole: _Table | None, taxonomy: Taxonomy
) -> dict[str, Any]:
    """A table of metrics, one row for each part and metric, one column for each stage or pair of stages.

    Rows that say nothing are kept apart: by the numbers of the stages in `whole`, or by their own where that is None.
    """
    columns = list(dict.fromkeys(column for table in parts.values() for column in table))
    shown: list[dict[str, Any]] = []
    hidden: list[dict[str, Any]] = []
    for part, table in parts.items():
        for name, (_, better) in ROWS.items():
            cells = [table.get(column, {}).get(name) for column in columns]
            found = [cell for cell in cells if cell is not None]
            if not found:
                continue
            judged = cells if whole is None else [stage.get(name) for stage in whole.values()]
            said = meaning(name, taxonomy)
            row = {"part": part, "name": name, "meaning": said, "better": better, "n": found[0].n, "cells": cells}
            (hidden if says_nothing(name, judged) else shown).append(row)
    return {"title": title, "what": what, "columns": columns, "rows": shown, "hidden": hidden}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of the provenance, each with its path; long lists (the phrases of a refusal list) as their length."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, f"{len(value)} entries"
    elif value is not None:
        yield path, str(value)
