"""The model card of an add-on: its figures with who judged them, the hashes that they hang on, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_fast import __version__
from psa_fast.evaluation.report import METRICS, counted_by, meaning
from psa_fast.files import read_json
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

LIMITS = (
    "It reads what the concept head was trained to read. Other risks, and other languages than those of its training "
    "data, pass unseen.",
    "A harmless request may be refused; the figures say how often on the rows that they were measured on, and nothing "
    "about other rows.",
    "Whoever may change the pixels, or has the weights, can look for pictures that the head does not see.",
    "The refusal lists read English alone, and any answer that does not refuse a risky request counts as unsafe by "
    "them.",
)


@dataclass(frozen=True)
class Measured:
    """What one report says of an add-on: rows are (by whom, metric, base's estimate, the add-on's own)."""

    title: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str, Mapping[str, Any] | None, Mapping[str, Any]], ...]
    taxonomy: Taxonomy = PSA


def read_measured(file: Path, addon_hash: str, policy_hash: str) -> Measured:
    """Return what a report of `psa-fast evaluate` or `psa-fast bench` says of an add-on.

    Raises:
        ValueError: it is no such report, or one of another add-on or policy.
    """
    report = read_json(file, "report")
    try:
        bench = "benchmark" in report
        told = report["answers"] if bench else report["provenance"]
        own = [stage for stage, facts in told["stages"].items() if facts["sha256"] == addon_hash]
        if not own:
            raise ValueError(
                f"report {file} has no stage with this add-on's hash {addon_hash[:16]}...: measure it anew"
            )
        if told["policy"]["sha256"] != policy_hash:
            raise ValueError(f"report {file} was made with another policy than --policy; give that one")
        stages = {name: _by_judge(report["stages"][name], bench) for name in ("base", own[0])}
        rows = tuple(
            (who, metric, stages["base"].get(who, {}).get(metric), estimate)
            for who, figures in stages[own[0]].items()
            for metric, estimate in figures.items()
            if metric in METRICS and estimate["value"] is not None
        )
        return Measured(_title(report, bench), _facts(report, told, bench), rows, counted_by(told))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is not a report of psa-fast evaluate or psa-fast bench") from None


def _by_judge(stage: Mapping[str, Any], bench: bool) -> Mapping[str, Mapping[str, Any]]:
    """A stage's figures by who says them; those of an evaluation are the refusal list's and the concept head's."""
    return stage if bench else {"evaluation": stage}


def _title(report: Mapping[str, Any], bench: bool) -> str:
    if bench:
        return str(report["recipe"]["title"])
    return f"`{Path(report['provenance']['data']['path']).name}`"


def _facts(report: Mapping[str, Any], told: Mapping[str, Any], bench: bool) -> tuple[tuple[str, str], ...]:
    """What makes the figures comparable, by name."""
    data = told["data"]
    if bench:
        judges = "; ".join(
            f"{name} {facts['judge'].get('model', '')}".strip() for name, facts in report["judges"].items()
        )
        date = report["date"]
    else:
        judges = f"refusal list {told['refusal']['list']}, mode {told['refusal']['mode']}"
        date = told["date"]
    return (
        ("rows", f"{data['rows']} of {data['rows_in_file']}"),
        ("judge", judges),
        ("answers", f"greedy, at most {told['decoding']['max_new_tokens']} new tokens"),
        ("data, sha256", f"`{data['sha256']}`"),
        ("images, sha256", f"`{data['images_sha256']}`"),
        ("measured", f"{date}, psa-fast {told['versions']['psa-fast']}, torch {told['versions']['torch']}"),
    )


def render_card(
    base: str | None, revision: str | None, licence: str | None, hashes: Mapping[str, str], measured: Sequence[Measured]
) -> str:
    """Return the card as Markdown with the hub's metadata.

    Args:
        base: the base's name on the hub; None for one that was a folder.
        revision: its commit.
        licence: the hub's identifier of the add-on's licence; None leaves it open.
        hashes: of add-on and policy, by name.
        measured: what the reports say.
    """
    lines = ["---", "library_name: psa-fast", "pipeline_tag: image-text-to-text"]
    lines += [f"license: {licence}"] * (licence is not None)
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: adapter"]
    lines += ["tags:", "- psa-fast", "- safety", "- concept-bottleneck", "---", "", "# PSA add-on", ""]
    where = f"`{base}`, commit `{revision}`" if base is not None else "one that has no name on the hub"
    lines += [
        f"A concept bottleneck with which a vision-language model reads the risk of a request. The base is {where}; "
        "it is not here, and its own terms hold.",
        "",
        "```",
        "psa-fast generate --model FOLDER"
        + (" --base BASE" if base is None else "")
        + " --policy policy.yaml --image IMAGE --prompt TEXT",
        "```",
        "",
        "## Figures",
        "",
    ]
    for report in measured:
        lines += [
            f"### {report.title}",
            "",
            "| by | metric | better | n | base | this |",
            "|---|---|---|---:|---:|---:|",
        ]
        for who, metric, before, after in report.rows:
            cells = (who, f"`{metric}`", METRICS[metric][1], str(after["n"]), _cell(before), _cell(after))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {name}: {value}" for name, value in report.facts), ""]
    used = dict.fromkeys((metric, meaning(metric, one.taxonomy)) for one in measured for _, metric, _, _ in one.rows)
    lines += [*(f"`{metric}`: {text}.  " for metric, text in used), "", "## Limits", ""]
    lines += [f"- {limit}" for limit in LIMITS]
    lines += ["", "## Hashes", "", *(f"- {name}: `{value}`" for name, value in hashes.items())]
    return "\n".join([*lines, f"- written by psa-fast {__version__}", ""])


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
