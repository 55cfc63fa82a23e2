"""Results of lmms-eval for one model in several settings, the guard on and off say, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psa_fast.files import read_json, shorten

# what must be the same for two columns to be compared: of the run, and of each task
RUN = ("limit", "offset", "gen_kwargs", "fewshot_seed")
TASK = ("versions", "n-shot", "n-samples", "higher_is_better", "task_hashes")


def find_results(path: Path) -> Path:
    """The results file of a run of lmms-eval, the newest below a folder. Raises ValueError if there is none."""
    if path.is_file():
        return path
    # their names begin with the date
    if not (found := sorted(path.rglob("*_results.json"), key=lambda file: file.name)):
        raise ValueError(f"{path} is no results file of lmms-eval and holds no *_results.json (--output_path)")
    return found[-1]


def ability_table(columns: Mapping[str, Path]) -> str:
    """Return the results by task and metric as a Markdown table with a column for each run, and what was run.

    Raises:
        ValueError: naming the file, for one that lmms-eval did not write, or runs that cannot be compared.
    """
    files = {name: find_results(path) for name, path in columns.items()}
    runs = {name: read_json(file, "results") for name, file in files.items()}
    for name, run in runs.items():
        if not all(isinstance(run.get(key), dict) for key in ("results", "config", *TASK[:4])):
            raise ValueError(f"{files[name]} is not a results file of lmms-eval")
    first = next(iter(runs))
    for name, run in runs.items():
        if (difference := _differ(runs[first], run)) is not None:
            raise ValueError(f"{first} and {name} cannot be compared: they differ in {difference}")
    lines = [f"| task | metric | better | n | {' | '.join(runs)} |", "|---|---|---|---:|" + "---:|" * len(runs)]
    for task, figures in runs[first]["results"].items():
        for key in figures:
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or "_stderr_" in metric:
                continue
            better = {True: "higher", False: "lower"}.get(
                runs[first]["higher_is_better"].get(task, {}).get(metric), "?"
            )
            count = runs[first]["n-samples"].get(task, {}).get("effective", "?")
            cells = [_cell(run["results"][task], metric, filtered) for run in runs.values()]
            shown = metric if filtered == "none" else key
            lines.append(f"| {task} | `{shown}` | {better} | {count} | {' | '.join(cells)} |")
    lines.append("")
    for name, run in runs.items():
        told = run["config"]
        facts = f"`--model {told.get('model')} --model_args {told.get('model_args')}`, {run.get('date', 'no date')}"
        lines.append(f"- {name}: {facts}, lmms-eval {run.get('lmms_eval_version', '?')}")
    return "\n".join([*lines, "", "In brackets the standard error that lmms-eval gives.", ""])


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What two runs differ in that makes their figures no neighbours; None if nothing does."""
    if one["results"].keys() != other["results"].keys():
        return f"tasks ({shorten(', '.join(sorted(one['results'].keys() ^ other['results'].keys())))})"
    for task, figures in one["results"].items():
        if figures.keys() != other["results"][task].keys():
            return f"the metrics of {task}"
    for name in RUN:
        if one["config"].get(name) != other["config"].get(name):
            return name
    return next((name for name in TASK if one.get(name) != other.get(name)), None)


def _cell(figures: Mapping[str, Any], metric: str, filtered: str) -> str:
    value, error = figures[f"{metric},{filtered}"], figures.get(f"{metric}_stderr,{filtered}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "n/a"
    return f"{value:.5g}" + (f" ({error:.2g})" if isinstance(error, int | float) else "")
