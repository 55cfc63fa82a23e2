"""`psa-fast data check` and `psa-fast data import`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Collection
from typing import Any

from psa_fast.data.importers import figstep, import_rows, psa
from psa_fast.data.records import Problem, Record, list_problems, read_records, unread_sentence
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

IMPORTERS: tuple[Any, ...] = (figstep, psa)  # modules, as psa_fast.data.importers describes them
MAX_REASONS = 20


def register(subparsers: Any) -> None:
    """Add `data` with its subcommands."""
    parser = subparsers.add_parser("data", help="check records, import public datasets")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="list every bad row of a data file; exit code 2 if there is one")
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

    parser = commands.add_parser("import", help="turn a public dataset into records")
    sources = parser.add_subparsers(dest="source_name", required=True, metavar="DATASET")
    for importer in IMPORTERS:
        name = importer.__name__.rpartition(".")[2]
        source = sources.add_parser(name, help=importer.HELP, description=f"Turn {importer.HELP} into records.")
        importer.add_arguments(source)
        source.add_argument("--out", required=True, help="the .jsonl to write")
        source.add_argument(
            "--on_bad_sample",
            choices=("skip", "error"),
            default="skip",
            help="rows that cannot be read are named and the exit code is 2: skip writes the others, error none",
        )
        source.set_defaults(func=import_command, importer=importer)


def check_command(args: argparse.Namespace) -> int:
    """Print every problem and return 2, or print counts and return 0."""
    return report(args.file, args.image_folder, args.keep_keys)


def import_command(args: argparse.Namespace) -> int:
    """Write a source's good rows, and account for all of them; 2 if some could not be read."""
    result = import_rows(args.importer.read(args), args.out, args.image_folder, args.on_bad_sample == "skip")
    for line in list_problems(result.problems):
        print(line)
    written = f"wrote {len(result.records)} records to {args.out}" if result.records else "wrote nothing"
    left_out = result.reasons.total()
    print(f"read {result.read} rows, {written}, {left_out} rows cannot be read")
    for reason, count in result.reasons.most_common(MAX_REASONS):
        print(f"  {count} x {reason}")
    if len(result.reasons) > MAX_REASONS:
        print(f"  and {len(result.reasons) - MAX_REASONS} more reasons")
    _print_counts(result.records)
    if args.image_folder is None and any(record.images for record in result.records):
        print("  the images were not looked at: no --image_folder")
    return 2 if left_out or not result.records else 0


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
        return 2
    print(f"{len(records)} record(s) in {path}, no problem")
    _print_counts(records)
    if unread:
        print(f"  not read: {unread_sentence(unread)}")
    return 0


def _print_counts(records: list[Record]) -> None:
    for title, counts in _counts(records).items():
        if counts:
            print(f"  by {title}: " + ", ".join(f"{name} {count}" for name, count in counts))


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
