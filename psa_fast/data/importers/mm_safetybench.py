"""MM-SafetyBench: harmful questions whose key phrase is moved from the words into a picture.

`processed_questions/SCENARIO.json` maps an id to its questions, `imgs/SCENARIO/KIND/ID.jpg` are the pictures of three
kinds: SD (drawn), TYPO (the phrase in letters), SD_TYPO (both). SD goes with "Rephrased Question(SD)", TYPO and SD_TYPO
with "Rephrased Question". The kinds are the splits here. There are no answers. The words are harmless alone; whether
the picture is, the source does not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psa_fast.data.importers.source import Entry, Source, text_of

HELP = "MM-SafetyBench's processed_questions and imgs"
LICENCE = "CC-BY-NC-4.0"
SPLITS = {"SD": 1680, "SD_TYPO": 1680, "TYPO": 1680}
QUESTION = {"SD": "Rephrased Question(SD)", "SD_TYPO": "Rephrased Question", "TYPO": "Rephrased Question"}
FOLDERS = ("processed_questions", "data/processed_questions")


def entries(source: Source) -> Iterator[Entry]:
    """Yield each question once for each kind of picture."""
    files = [path for folder in FOLDERS for path in sorted((source.folder / folder).glob("*.json"))]
    if not files:
        source.needed(*(f"{folder}/01-Illegal_Activitiy.json" for folder in FOLDERS))
    for path in files:
        for entry in source.json_entries(path, "", "key"):
            for kind in filter(source.wants, SPLITS):
                yield entry._replace(split=kind, value=entry.value | {"scenario": path.stem})


def records(source: Source, entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield the question that belongs to the kind of picture; the three kinds are twins."""
    value, kind = entry.value, entry.split
    scenario, key = value["scenario"], value["key"]
    image = source.pictures.find(f"{scenario}/{kind}/{key}.jpg", ("imgs", "data/imgs", "MM-SafetyBench(imgs)"))
    yield source.record(
        entry,
        f"{scenario}-{key}-{kind}",
        text_of(value, QUESTION[kind]),
        source.map.label(scenario),
        scenario,
        image,
        twin=f"mm_safetybench-{scenario}-{key}",
        group="risk",
        image_label="unknown",
        text_label="safe",
        joint_label="unsafe",
    )
