"""The report of a benchmark: its figures by judge and stage, beside the recipe that they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_fast.evaluation.benchmark_recipe import Recipe
from psa_fast.evaluation.report import METRICS, meaning
from psa_fast.files import read_json, write_text

HEAD = "concept head"  # whose figures need no judge
# of the report of the answers; date and seconds are those of one process, and another one has others
ANSWERED = ("data", "policy", "decoding", "base", "versions", "hardware", "bootstrap")


def write_benchmark_report(
    out: Path,
    benchmark: str,
    recipe: tuple[Recipe, str],
    date: str,
    imported: Mapping[str, Any],
    asked: Mapping[str, Any],
    judges: Sequence[str],
) -> None:
    """Write `out`/report.json and `out`/report.md from what the steps left there.

    Args:
        out: the run's folder.
        benchmark: the recipe's name.
        recipe: the recipe and the hash of its file.
        date: when the run began.
        imported: what became of the source's rows.
        asked: what each step was asked.
        judges: the judges by name, in the report's order.

    Raises:
        ValueError: a file that a step left cannot be read.
    """
    answers = read_json(out / "answers" / "report.json", "report")
    judged = {name: read_json(out / "verdicts" / f"judged-{name}.json", "figures") for name in judges}
    told = answers["provenance"]
    content = {
        "benchmark": benchmark,
        "date": date,
        "recipe": {**recipe[0].to_json(), "sha256": recipe[1]},
        "asked": dict(asked),
        "import": dict(imported),
        "answers": {name: told[name] for name in ANSWERED}
        | {"data": {**told["data"], "path": "records.jsonl"}}
        | {"stages": {stage: _without_time(facts) for stage, facts in told["stages"].items()}},
        "judges": {name: found["provenance"] for name, found in judged.items()},
        "stages": {
            stage: _figures(recipe[0].metrics, stage, answers["stages"][stage], judged) for stage in answers["stages"]
        },
        "verdicts": {
            name: {stage: facts["verdicts"] for stage, facts in found["stages"].items()}
            for name, found in judged.items()
        },
    }
    write_text(out / "report.md", _render(content))
    write_text(out / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def _without_time(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("seconds", "batch_seconds")}


def _figures(
    metrics: Sequence[str], stage: str, concept: Mapping[str, Any], judged: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """A stage's figures by who says them: each judge, and the concept head."""
    found: dict[str, dict[str, Any]] = {}
    for name, figures in judged.items():
        said = figures["stages"][stage]["figures"]
        found[name] = {
            metric + side: said[metric + side]
            for metric in metrics
            for side in ("", "_unguarded")
            if metric + side in said
        }
    answers = {metric for figures in found.values() for metric in figures}
    head = {metric: concept[metric] for metric in metrics if metric in concept and metric not in answers}
    return found | ({HEAD: head} if head else {})


def _render(content: Mapping[str, Any]) -> str:
    recipe, data, imported = content["recipe"], content["answers"]["data"], content["import"]
    stages = list(content["stages"])
    lines = [
        f"# {recipe['title']}",
        "",
        f"{data['rows']} of {data['rows_in_file']} rows, "
        + ", ".join(f"{group} {count}" for group, count in data["groups"].items())
        + "; value [95% interval].",
        "",
        f"| by | metric | better | n | {' | '.join(stages)} |",
        "|---|---|---|---:|" + "---:|" * len(stages),
    ]
    rows = dict.fromkeys(
        (who, metric) for stage in stages for who, figures in content["stages"][stage].items() for metric in figures
    )
    for who, metric in rows:
        cells = [content["stages"][stage].get(who, {}).get(metric) for stage in stages]
        counts = list(dict.fromkeys(str(cell["n"]) for cell in cells if cell))
        shown = [who, f"`{metric}`", METRICS[metric][1], " / ".join(counts), *map(_cell, cells)]
        lines.append(f"| {' | '.join(shown)} |")
    lines += ["", "## What the numbers mean", ""]
    lines += [f"- `{metric}`: {meaning(metric)}." for metric in dict.fromkeys(metric for _, metric in rows)]
    for name, facts in content["judges"].items():
        lines.append(f"- {name}: over-refusal by {facts['over_refusal_by']}.")
        for stage, verdicts in content["verdicts"][name].items():
            lines.append(f"  - {stage}: " + ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items()))
    lines += [
        "",
        "## How they were obtained",
        "",
        f"- the published protocol: {recipe['published']}.",
        f"- where this differs: {recipe['differs']}.",
        f"- prompt: {recipe['prompt']}.",
        f"- at most {content['answers']['decoding']['max_new_tokens']} new tokens, greedy; the recipe says "
        f"{recipe['max_new_tokens']}.",
        f"- split: {content['asked']['records']['split'] or 'all that are there'}; read {imported['read']} rows, wrote "
        f"{imported['written']}, left out {imported['left_out']}.",
    ]
    lines += [f"  - {count} x {reason}" for reason, count in imported["reasons"].items()]
    lines += [f"- data: sha256 `{data['sha256']}`, images `{data['images_sha256']}`."]
    lines += [f"- judge {name}: `{json.dumps(facts['judge'])}`." for name, facts in content["judges"].items()]
    lines += [
        f"- recipe: sha256 `{recipe['sha256']}`; policy sha256 `{content['answers']['policy']['sha256']}`.",
        f"- stages: `{json.dumps(content['answers']['stages'])}`.",
        f"- versions: `{json.dumps(content['answers']['versions'])}`.",
        f"- hardware: `{json.dumps(content['answers']['hardware'])}`.",
        f"- begun: {content['date']}.",
        "",
    ]
    return "\n".join(lines)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate["value"] is None:
        return "n/a"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
