"""robustness.json and robustness.md: every condition with n, shares, intervals and what the base can do under it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_fast.attacks.measure import ABLE, RISKS
from psa_fast.files import write_text

JSON, PAGE = "robustness.json", "robustness.md"
_WORDS = {
    "attack success": "guarded answers to risks that are unsafe",
    "missed": "risks that the guard did not flag",
    "lost": "of the risks that the guard flags when they are asked plainly, those that it flags no more",
    "lowered": "risks above level low that are read as low",
    "useful": "answers that are word by word what the attacker wanted, past the guard where one is asked",
    "refused": "guarded answers to harmless requests with a refusal or a caution",
    "flagged": "harmless requests that the guard flags; behind it the same without the change",
    "base": f"clean questions that the base answers rightly under the change; below {ABLE} nobody can "
    "answer, the row is no failure of the guard and in brackets",
    "blocked": "requests too long for the model, refused unread and in no share",
    "cut": "risks whose sign the change cuts off or covers, so that their label no longer holds; they are not asked",
}


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write both files, whole or not at all."""
    write_text(folder / JSON, json.dumps({"rows": list(rows), "provenance": dict(provenance)}, indent=1) + "\n")
    write_text(folder / PAGE, page(rows, provenance))


def page(rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> str:
    """The report for people, as Markdown."""
    able = {row["condition"]: row["accuracy"] for row in rows if row["stage"] == "base" and "accuracy" in row}
    lines = ["# Robustness", "", "Shares with their 95% interval (Wilson).", ""]
    for suite in dict.fromkeys(row["suite"] for row in rows if row["suite"] != "controls"):
        mine = [row for row in rows if row["suite"] == suite and row["stage"] != "base"]
        for title, columns, chosen in (
            ("risks", ("attack_success", "useful", "missed", "lost", "lowered"),
             [r for r in mine if r["group"] in RISKS]),
            ("harmless requests", ("refused", "flagged", "flagged_plain", "accuracy"),
             [r for r in mine if r["group"] not in RISKS]),
        ):  # fmt: skip
            shown = [name for name in columns if any(row.get(name) for row in chosen)]
            if not shown:
                continue
            heading = "as they are" if suite == "none" else suite
            lines += [f"## {heading}: {title}", ""]
            head = ["condition", "group", "stage", "n", "blocked", "cut", *(n.replace("_", " ") for n in shown), "base"]
            lines += [f"| {' | '.join(head)} |", f"|{'---|' * 3}{'---:|' * (len(head) - 3)}"]
            for row in chosen:
                base = able.get(row["condition"])
                cells = [row["condition"], row["group"], row["stage"], str(row["n"]), str(row["blocked"])]
                cells.append(str(row.get("cut", 0)))
                cells += [_cell(row.get(name)) for name in shown]
                if base is not None and (base["value"] or 0.0) < ABLE:
                    cells[0] = f"({cells[0]})"
                lines.append(f"| {' | '.join([*cells, _cell(base)])} |")
            lines.append("")
    if checks := [row for row in rows if row["suite"] == "controls"]:
        lines += ["## Are gradients masked?", "", "| check | stage | n | passed | found |", "|---|---|---:|---|---|"]
        for row in checks:
            found = {key: value for key, value in row["settings"].items() if key not in ("passed", "n", "seed")}
            passed = {True: "yes", False: "**no**", None: "not made"}[row["settings"]["passed"]]
            numbers = "; ".join(f"{key} {_number(value)}" for key, value in found.items())
            lines.append(f"| {row['condition']} | {row['stage']} | {row['n']} | {passed} | {numbers} |")
        lines.append("")
    if any(row.get("settings", {}).get("got_through") for row in rows):
        lines += ["## Pictures that got through", "", "Behind each the picture that it was made of.", ""]
        for row in rows:
            for one in row.get("settings", {}).get("got_through", ()):
                what = f"{row['stage']}, {row['condition']}, {one['where']}: {one['asked']!r} {one['answer']!r}"
                lines += [f"![]({one['file']}) ![]({one['before']}) {' '.join(what.split())}", ""]
    lines += ["## What the columns mean", "", *(f"- {name}: {text}." for name, text in _WORDS.items()), ""]
    lines += ["## How they were obtained", ""]
    lines += [f"- {key}: `{value}`" for key, value in provenance.items()]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    """A control's number, list or table of numbers."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_number(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate["value"] is None:
        return "n/a"
    return f"{estimate['value']:.3f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
