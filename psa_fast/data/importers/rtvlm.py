"""RTVLM (red teaming VLMs): questions about images, graded by annotators as to how one should answer.

Each subset is a JSONL of its own beside a zip of images named after the row's id:
`data/Safety/Politics/politics.jsonl`, `data/Safety/Racial/racial.jsonl`, `data/Celebrity/mixed.jsonl` (prompt, id),
`data/Harmful/misleading.jsonl` (questions, index), `data/Jailbreak/jailbreak.jsonl` and
`data/Jailbreak2/jailbreak.jsonl` (instruction, index; one zip for both). The subsets are the splits.
`refused_to_answer` lists the annotators' grades of the question, the most careful one counts;
without it the table's level does. There are no answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers import BadRow
from psa_fast.data.importers.source import Entry, Source, text_of
from psa_fast.data.importers.taxonomy_map import SAFE, Label
from psa_fast.files import shorten

HELP = "RTVLM's JSONL files and their zips"
LICENCE = None
SPLITS = {"politics": 200, "racial": 200, "celebrity": 200, "misleading": 100, "jailbreak": 200, "jailbreak2": 21}
# split -> its file, and the folder of its images
FILES = {
    "politics": ("data/Safety/Politics/politics.jsonl", "data/Safety/Politics"),
    "racial": ("data/Safety/Racial/racial.jsonl", "data/Safety/Racial"),
    "celebrity": ("data/Celebrity/mixed.jsonl", "data/Celebrity"),
    "misleading": ("data/Harmful/misleading.jsonl", "data/Harmful"),
    "jailbreak": ("data/Jailbreak/jailbreak.jsonl", "data/Jailbreak"),
    "jailbreak2": ("data/Jailbreak2/jailbreak.jsonl", "data/Jailbreak"),
}


def entries(source: Source) -> Iterator[Entry]:
    """Yield the rows of the subsets that are there."""
    for split, path in source.by_split({split: (file,) for split, (file, _) in FILES.items()}):
        yield from source.json_rows(path, split)


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield one row a question; questions of one image are twins."""
    value = entry.value
    key = value.get("id", value.get("index"))
    if not isinstance(key, str | int) or isinstance(key, bool) or not str(key).strip():
        raise BadRow(f"id is {shorten(key)}; expected a text or a number")
    questions = value.get("questions")
    if questions is None:
        questions = [text_of(value, "prompt" if "prompt" in value else "instruction")]
    if not isinstance(questions, list) or not questions or not all(isinstance(q, str) and q.strip() for q in questions):
        raise BadRow(f"questions is {shorten(questions)}; expected a list of texts")
    label, grades = source.map.label(entry.split), value.get("refused_to_answer")
    if isinstance(grades, str | list) and grades:
        level = max(source.map.level(grade) for grade in ([grades] if isinstance(grades, str) else grades))
        label = Label(label.safe_type, level) if level else SAFE
    elif grades is not None:
        raise BadRow(f"refused_to_answer is {shorten(grades)}; expected a list of grades")
    folder = FILES[entry.split][1]
    image = source.pictures.find_stem(str(key), (folder, f"{folder}/img"), folder)
    for number, question in enumerate(questions, start=1):
        # the question was graded: of the picture alone nothing is said
        yield source.record(
            entry,
            f"{entry.split}-{key}" + (f"-{number}" if len(questions) > 1 else ""),
            question,
            label,
            {"subset": entry.split, "refused_to_answer": grades} if grades is not None else entry.split,
            image,
            group="risk" if label.risky else "benign_twin",
            image_label="unknown",
            twin=f"rtvlm-{entry.split}-{key}" if len(questions) > 1 else None,
        )
