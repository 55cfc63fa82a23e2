"""`psa-fast data check` and `psa-fast data import`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from psa_fast.data.importers import write_rows
from psa_fast.data.importers.figstep import figstep_rows
from psa_fast.data.records import Problem, Record, list_problems, read_records, unread_sentence
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES


def register(subparsers: Any) -> None:
    """Add `data` with its subcommands."""
    parser = subparsers.add_parser("data", help="check records, import public datasets")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="list every bad row of a data file; exit code 1 if there is one")
    check.add_argument("file", metavar="FILE", help="records as .jsonl, or .json with one list")
    check.add_argument("--image_folder", help="folder that image paths are relative to (not needed without images)")
    check.add_argument(
        "--keep_keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys that look like ours (label, say) and are to be left unread; other such keys are problems",
    )
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
    return report(args.file, args.image_folder, args.keep_keys)


def import_figstep_command(args: argparse.Namespace) -> int:
    """Write the records and check them as `data check` does."""
    if not Path(args.image_folder).is_dir():
        raise ValueError(f"image folder {args.image_folder!r} does not exist or is not a folder")
    count = write_rows(args.out, figstep_rows(args.csv))
    print(f"wrote {count} records to {args.out}")
    return report(args.out, args.image_folder)


def report(path: str, image_folder: str | None, keep_keys: Collection[str] = ()) -> int:
    """Print what is wrong with a data file, or what it holds; return the exit code."""
    records, problems, unread = read_records(path, image_folder, keep_keys=keep_keys)
    if not records and not problems:
        problems = [Problem(path, 1, "the file holds no records")]
    for line in list_problems(problems):
        print(line)
    if problems:
        print(f"{len(problems)} problem(s); {len(records)} good record(s) in {path}", file=sys.stderr)
        if unread:
            print(f"  not read: {unread_sentence(unread)}", file=sys.stderr)
        return 1
    print(f"{len(records)} record(s) in {path}, no problem")
    for title, counts in _counts(records).items():
        print(f"  by {title}: " + ", ".join(f"{name} {count}" for name, count in counts))
    if unread:
        print(f"  not read: {unread_sentence(unread)}")
    return 0


def _counts(records: list[Record]) -> dict[str, list[tuple[str, int]]]:
    """Numbers of records by type, level, group and number of images."""

    def name(value: int | None, names: tuple[str, ...]) -> str:
        return "not labelled" if value is None else f"{value} {names[value]}"

    return {
        "type": sorted(Counter(name(record.safe_type, RISK_TYPES) for record in records).items()),
        "level": sorted(Counter(name(record.safe_level, RISK_LEVELS) for record in records).items()),
        "group": sorted(Counter(record.group or "none, in no safety metric" for record in records).items()),
        "images": sorted(Counter(str(len(record.images)) for record in records).items(), key=lambda item: int(item[0])),
    }
