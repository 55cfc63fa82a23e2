"""What every measurement is given: records, base and add-ons, the guard's policy, and where the report goes."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast.data.rows import folder_hint
from psa_fast.files import named, shorten

if TYPE_CHECKING:
    from psa_fast.data.records import Record

STAGE_DIRS = ("stage1", "stage2")

LONGEST = 32  # tokens of an answer, unless --max_new_tokens says otherwise


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options that all measurements have."""
    parser.add_argument("--data", required=True, metavar="PATH", help="folder with SPLIT.jsonl, or a JSONL file")
    parser.add_argument("--split", default="test", help="SPLIT.jsonl of the data folder (default: test)")
    parser.add_argument("--image_folder", metavar="DIR", help="where image paths start (default: the data folder)")
    parser.add_argument("--run", metavar="DIR", help="training output: its stage1 and stage2 folders are measured")
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-ons' configs name)")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=DIR", help="a further add-on; may be given several times"
    )
    parser.add_argument("--policy", metavar="FILE", help="policy YAML of the guarded runs (default: the shipped one)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=LONGEST, metavar="N", help=f"longest answer (default: {LONGEST})"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder the report is written to")
    parser.add_argument("--overwrite", action="store_true", help="replace what other data or settings gave in --out")


@dataclass(frozen=True)
class Plan:
    """What to evaluate: the base and the add-ons by stage name, in the report's order."""

    base: str
    addons: dict[str, str]


def addons_of(run: str) -> dict[str, str]:
    """The add-on folders of a run by their stages' names, in order. Raises ValueError if there is none."""
    from psa_fast.safety.load import CONFIG

    addons = {name: str(Path(run) / name) for name in STAGE_DIRS if (Path(run) / name / CONFIG).is_file()}
    if not addons:
        raise ValueError(f"--run {run} holds no add-on: neither {' nor '.join(STAGE_DIRS)} has a {CONFIG}")
    return addons


def named_stages(given: Sequence[str]) -> list[tuple[str, str]]:
    """The names and folders of `--stage NAME=DIR`. Raises ValueError for another text."""
    found = []
    for item in given:
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise ValueError(f"--stage {shorten(item)}: expected NAME=DIR")
        found.append((name, folder))
    return found


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError, naming the file, if it cannot be read."""
    with named(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()


def plan(run: str | None, base: str | None, stages: Sequence[tuple[str, str]]) -> Plan:
    """Find the add-ons and their base. Raises ValueError if there is nothing to evaluate or the bases differ."""
    from psa_fast.safety.load import base_of

    addons = {} if run is None else addons_of(run)
    for name, folder in stages:
        if not name.replace("_", "").replace("-", "").isalnum() or name == "base":
            raise ValueError(f"{name!r} cannot name a stage: use letters, digits, - and _, and not 'base'")
        if name in addons:
            raise ValueError(f"stage {name} was given twice: {addons[name]} and {folder}")
        addons[name] = folder
    bases = {name: base_of(folder) for name, folder in addons.items()} if base is None else {"": base}
    if not bases:
        raise ValueError("nothing to evaluate: give --run, --base, --stage1, --stage2 or --stage NAME=DIR")
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{name}: {path}" for name, path in bases.items())
        raise ValueError(f"the add-ons name different bases ({named}); give one with --base")
    return Plan(next(iter(bases.values())), addons)


def find_data(data: str, split: str, image_folder: str | None, option: str = "--data") -> tuple[Path, Path]:
    """The JSONL file and the image folder of `option`'s value. Raises ValueError, naming it, if they do not exist."""
    path = Path(data)
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{option} {data}: there is no file {file}{folder_hint(path)}")
    return file, Path(image_folder) if image_folder is not None else file.parent


def spread(records: Sequence[Record], limit: int | None) -> list[Record]:
    """`limit` records at even distances, so that a file sorted by group keeps all of its groups."""
    if limit is None or limit >= len(records):
        return list(records)
    return [records[i * len(records) // limit] for i in range(limit)]
