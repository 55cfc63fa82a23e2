"""`psa-fast data check` and `psa-fast data import`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from psa_fast.data.importers import write_rows
from psa_fast.data.importers.figstep import figstep_rows
from psa_fast.data.records import NO_IMAGE_FOLDER, Problem, Record, read_records
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

SHOWN_WITHOUT_FOLDER = 3  # one missing option is wrong with all the others too


def register(subparsers: Any) -> None:
    """Add `data` with its subcommands."""
    parser = subparsers.add_parser("data", help="check records, import public datasets")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="list every bad row of a data file; exit code 1 if there is one")
    check.add_argument("file", metavar="FILE", help="records as .jsonl, or .json with one list")
    check.add_argument("--image_folder", help="folder that image paths are relative to (not needed without images)")
    check.set_defaults(func=check_command)

    importers = commands.add_parser("import", help="turn a public dataset into records")
    sources = importers.add_subparsers(dest="source", required=True, metavar="DATASET")
    figstep = sources.add_parser("figstep", help="FigStep's SafeBench or SafeBench-Tiny CSV and its images")
    figstep.add_argument("--csv", required=True, help="the dataset's CSV")
    figstep.add_argument("--image_folder", required=True, help="folder of the query_*.png images")
    figstep.add_argument("--out", required=True, help="the .jsonl to write")
    figstep.set_defaults(func=import_figstep_command)


def check_command(args: argparse.Namespace) -> int:
    """Print every problem and return 1, or print counts and return 0."""
    return _report(args.file, args.image_folder)


def import_figstep_command(args: argparse.Namespace) -> int:
    """Write the records and check them as `data check` does."""
    if not Path(args.image_folder).is_dir():
        raise ValueError(f"image folder {args.image_folder!r} does not exist or is not a folder")
    count = write_rows(args.out, figstep_rows(args.csv))
    print(f"wrote {count} records to {args.out}")
    return _report(args.out, args.image_folder)


def _report(path: str, image_folder: str | None) -> int:
    records, problems = read_records(path, image_folder)
    if not records and not problems:
        problems = [Problem(path, 1, "the file holds no records")]
    without_folder = 0
    for problem in problems:
        lacks_folder = problem.message.endswith(NO_IMAGE_FOLDER)
        without_folder += lacks_folder
        if not lacks_folder or without_folder <= SHOWN_WITHOUT_FOLDER:
            print(problem)
    if without_folder > SHOWN_WITHOUT_FOLDER:
        print(f"... and {without_folder - SHOWN_WITHOUT_FOLDER} more image(s) in {path}: each {NO_IMAGE_FOLDER}")
    if problems:
        print(f"{len(problems)} problem(s); {len(records)} good record(s) in {path}", file=sys.stderr)
        return 1
    print(f"{len(records)} record(s) in {path}, no problem")
    for title, counts in _counts(records).items():
        print(f"  by {title}: " + ", ".join(f"{name} {count}" for name, count in counts))
    return 0


def _counts(records: list[Record]) -> dict[str, list[tuple[str, int]]]:
    """Numbers of records by type, level, group and number of images."""

    def name(value: int | None, names: tuple[str, ...]) -> str:
        return "not labelled" if value is None else f"{value} {names[value]}"

    return {
        "type": sorted(Counter(name(record.safe_type, RISK_TYPES) for record in records).items()),
        "level": sorted(Counter(name(record.safe_level, RISK_LEVELS) for record in records).items()),
        "group": sorted(Counter(record.group for record in records).items()),
        "images": sorted(Counter(str(len(record.images)) for record in records).items(), key=lambda item: int(item[0])),
    }
