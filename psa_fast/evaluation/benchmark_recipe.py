"""How a public benchmark is asked, judged and reported: one YAML file in `benchmarks` for each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from psa_fast.data.importers import IMPORTERS
from psa_fast.evaluation.judges.known import FORMATS, JUDGES
from psa_fast.evaluation.refusal import LISTS
from psa_fast.evaluation.report import METRICS
from psa_fast.files import read_yaml, shorten

FOLDER = Path(__file__).with_name("benchmarks")
BENCHMARKS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class Recipe:
    """A benchmark's recipe.

    Args:
        title: the benchmark's own name.
        importer: which of IMPORTERS reads it.
        split: which split is asked, None for all.
        prompt: what is asked, in words; the importer makes it.
        max_new_tokens: the longest answer.
        judge: the judge that is nearest to the published one, of JUDGES.
        refusal_list: the list of the judge keywords, and of over-refusal where the judge tells no refusals.
        metrics: names of figures in report.json, in the report's order.
        published: what the published protocol says.
        differs: where ours differs from it.
        files: for importers that take files of any name: option -> paths below the source, the first there is.
    """

    title: str
    importer: str
    split: str | None
    prompt: str
    max_new_tokens: int
    judge: str
    refusal_list: str
    metrics: tuple[str, ...]
    published: str
    differs: str
    files: Mapping[str, tuple[str, ...]]

    @property
    def needs_model(self) -> bool:
        """Whether its judge is a model, which has to be given."""
        return self.judge in FORMATS

    def to_json(self) -> dict[str, Any]:
        """Everything in it, for a report."""
        return asdict(self)


def read_recipe(name: str, folder: Path = FOLDER) -> tuple[Recipe, str]:
    """Return a benchmark's recipe and the SHA-256 of its file.

    Raises:
        ValueError: naming the file and the key that is wrong.
    """
    path = folder / f"{name}.yaml"
    raw = {"files": {}, **read_yaml(path, "recipe")}
    names = {part.name for part in fields(Recipe)}
    if wrong := (names ^ raw.keys()):
        raise ValueError(f"{path}: keys that are missing or none of a recipe: {', '.join(sorted(map(str, wrong)))}")
    texts = ("title", "importer", "prompt", "judge", "refusal_list", "published", "differs")
    for key in texts:
        _expect(path, key, raw[key], isinstance(raw[key], str) and bool(raw[key].strip()), "text")
    for key, known in (("importer", IMPORTERS), ("judge", JUDGES), ("refusal_list", LISTS)):
        _expect(path, key, raw[key], raw[key] in known, f"one of {', '.join(known)}")
    _expect(path, "split", raw["split"], raw["split"] is None or isinstance(raw["split"], str), "a name or null")
    tokens = raw["max_new_tokens"]
    _expect(path, "max_new_tokens", tokens, type(tokens) is int and tokens > 0, "a number above 0")
    metrics = raw["metrics"]
    right = isinstance(metrics, list) and metrics and all(isinstance(m, str) and m in METRICS for m in metrics)
    _expect(path, "metrics", metrics, bool(right), "a list of figures of report.json")
    files = raw["files"]
    right = isinstance(files, dict) and all(isinstance(paths, list) and paths for paths in files.values())
    _expect(path, "files", files, bool(right), "lists of paths by option")
    raw |= {"metrics": tuple(metrics), "files": {str(key): tuple(map(str, paths)) for key, paths in files.items()}}
    return Recipe(**raw), hashlib.sha256(path.read_bytes()).hexdigest()


def _expect(path: Path, key: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{path}: {key} is {shorten(value)}; expected {expected}")
