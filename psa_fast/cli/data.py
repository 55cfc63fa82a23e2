"""`psa-fast data check`, `psa-fast data import` and `psa-fast data overlap`; taxonomies.py has the others."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Collection
from typing import Any

from psa_fast.cli import taxonomies
from psa_fast.data.importers import IMPORTERS, load_importer
from psa_fast.data.importers.source import Source
from psa_fast.data.importers.writing import Import, import_rows
from psa_fast.data.overlap import KINDS, MAX_DISTANCE, MIN_JACCARD, Overlaps
from psa_fast.data.records import Problem, list_problems, read_records, unread_sentence
from psa_fast.files import write_text
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import read_taxonomy
from psa_fast.taxonomy.heads import Taxonomy

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
    taxonomies.add_taxonomy(check)
    check.set_defaults(func=check_command)
    taxonomies.register(commands)

    parser = commands.add_parser("overlap", help="what files of records, or the splits of one, have in common")
    parser.add_argument("files", nargs="+", metavar="FILE", help="records as .jsonl, or .json with one list")
    parser.add_argument(
        "--image_folder", nargs="+", default=[], metavar="DIR", help="one for all files, or one for each in their order"
    )
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers and examples here too")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if anything is shared")
    parser.add_argument(
        "--max_distance",
        type=int,
        default=MAX_DISTANCE,
        help="bits of 128 in which two images' dHashes may differ (default %(default)s)",
    )
    parser.add_argument(
        "--min_jaccard",
        type=float,
        default=MIN_JACCARD,
        help="share of three-word sequences that two texts must have in common (default %(default)s)",
    )
    parser.set_defaults(func=overlap_command)

    parser = commands.add_parser("import", help="turn a public dataset into records")
    parser.add_argument("--list", action="store_true", help="print the datasets with their splits and licences")
    parser.set_defaults(func=list_command)
    sources = parser.add_subparsers(dest="source_name", metavar="DATASET")
    for name in IMPORTERS:
        importer = load_importer(name)
        source = sources.add_parser(name, help=importer.HELP, description=f"Turn {importer.HELP} into records.")
        if hasattr(importer, "add_arguments"):
            importer.add_arguments(source)
        else:
            _add_folder_arguments(source, importer)
        if hasattr(importer, "OWN_RECORDS"):
            taxonomies.add_taxonomy(source)
        source.add_argument("--out", required=True, help="the .jsonl to write")
        source.add_argument(
            "--on_bad_sample",
            choices=("skip", "error"),
            default="skip",
            help="rows that cannot be read are named and the exit code is 2: skip writes the others, error none",
        )
        source.set_defaults(func=import_command, importer=importer)


def _add_folder_arguments(parser: argparse.ArgumentParser, importer: Any) -> None:
    parser.add_argument("--source", required=True, metavar="DIR", help="the dataset's folder, as it was published")
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="write the images here, each content once; needed where they stand in Parquet, zip or tar files, "
        "otherwise they stay where they are",
    )
    parser.add_argument("--taxonomy_map", metavar="FILE", help="YAML table of categories in the place of our own")
    parser.add_argument("--split", help=f"read this one alone: {', '.join(importer.SPLITS) or 'the name of a file'}")


def check_command(args: argparse.Namespace) -> int:
    """Print every problem and return 2, or print counts and return 0."""
    return report(args.file, args.image_folder, args.keep_keys, read_taxonomy(args.taxonomy))


def list_command(args: argparse.Namespace) -> int:
    """Print the datasets that can be imported."""
    if not args.list:
        raise ValueError(f"data import needs a DATASET (or --list): {', '.join(IMPORTERS)}")
    for name in IMPORTERS:
        importer = load_importer(name)
        licence = getattr(importer, "LICENCE", None) or "see the source"
        splits = ", ".join(f"{split} {size or '?'}" for split, size in getattr(importer, "SPLITS", {}).items())
        print(f"{name}: {importer.HELP}; licence: {licence}" + (f"; entries: {splits}" if splits else ""))
    return 0


def import_command(args: argparse.Namespace) -> int:
    """Write a source's good rows, and account for all of them; 2 if some could not be read."""
    if args.list:
        raise ValueError(f"--list prints all datasets and imports none; leave {args.source_name} or --list out")
    whole = args.on_bad_sample == "error"
    taxonomy = read_taxonomy(args.taxonomy) if hasattr(args, "taxonomy") else PSA
    if hasattr(args.importer, "add_arguments"):
        source, rows = None, args.importer.read(args)
        image_folder = args.image_folder  # an importer that writes the images says where
        result = import_rows(rows, args.out, image_folder, not whole, taxonomy=taxonomy)
    else:
        source = Source(args.source_name, args.source, args.split, args.images, args.taxonomy_map)
        image_folder = str(source.pictures.root)
        result = import_rows(source.rows(), args.out, image_folder, not whole)
    for line in list_problems(result.problems):
        print(line)
    written = f"wrote {result.written} records to {args.out}" if result.written else "wrote nothing"
    left_out = result.reasons.total()
    print(f"read {result.read} rows, {written}, {left_out} rows cannot be read")
    for reason, count in result.reasons.most_common(MAX_REASONS):
        print(f"  {count} x {reason}")
    if len(result.reasons) > MAX_REASONS:
        print(f"  and {len(result.reasons) - MAX_REASONS} more reasons")
    if source is not None:
        _print_source(source, result)
    if result.from_template:
        print(f"  {result.from_template} answers are ours, since the source has none: to evaluate, not to learn")
    _print_counts(result.counts, taxonomy)
    if image_folder is None and result.with_images:
        print("  the images were not looked at: no --image_folder")
    return 2 if left_out or not result.written else 0


def _print_source(source: Source, result: Import) -> None:
    """What of the published set was there, and where the images are."""
    for split, size in source.published.items():
        if not source.wants(split):
            continue
        found = source.entries[split]
        missing = f", {size - found} missing" if size is not None and found < size else ""
        print(f"  split {split}: {found} entries" + (f" of {size} published{missing}" if size is not None else ""))
    if result.with_images:
        duplicates = f"; {source.pictures.duplicates} were there already" if source.pictures.out else ""
        print(f"  --image_folder {source.pictures.root}{duplicates}")


def overlap_command(args: argparse.Namespace) -> int:
    """Print what the files share; with --strict 1 if that is anything."""
    if not 0 <= args.max_distance <= 32:
        raise ValueError(f"--max_distance is {args.max_distance}; expected 0 to 32 of 128 bits")
    if not MIN_JACCARD <= args.min_jaccard <= 1:
        raise ValueError(f"--min_jaccard is {args.min_jaccard}; expected {MIN_JACCARD} to 1")
    folders = args.image_folder * (len(args.files) if len(args.image_folder) == 1 else 1) or [None] * len(args.files)
    if len(folders) != len(args.files):
        raise ValueError(f"--image_folder names {len(folders)} folders for {len(args.files)} files; expected 1 or each")
    if len(set(args.files)) < len(args.files):
        raise ValueError("a FILE is named twice")
    overlaps = Overlaps(args.max_distance, args.min_jaccard)
    for file, folder in zip(args.files, folders, strict=True):
        overlaps.add_file(file, folder)
    found = overlaps.report()
    if args.out is not None:
        write_text(args.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for part in found["parts"]:
        print(f"{part['name']}: {part['records']} records")
    for pair in found["overlaps"]:
        print(f"{pair['first']} and {pair['second']} share:")
        for kind in KINDS:
            if pair[kind]:
                example = pair["examples"][kind][0]
                print(f"  {kind.replace('_', ' ')}: {pair[kind]}, such as {example['first']} and {example['second']}")
    if not found["overlaps"]:
        print("they share nothing")
    if overlaps.not_compared:
        print(f"  {overlaps.not_compared} images were not compared: no --image_folder")
    if overlaps.plain:
        print(f"  {overlaps.plain} images are too plain for near-duplicates, and were compared by content alone")
    return 1 if args.strict and found["overlaps"] else 0


def report(path: str, image_folder: str | None, keep_keys: Collection[str] = (), taxonomy: Taxonomy = PSA) -> int:
    """Print what is wrong with a data file, or what it holds; return the exit code."""
    records, problems, unread = read_records(path, image_folder, keep_keys=keep_keys, taxonomy=taxonomy)
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
    _print_counts(Counter((r.safe_type, r.safe_level, r.group, len(r.images)) for r in records), taxonomy)
    if unread:
        print(f"  not read: {unread_sentence(unread)}")
    return 0


def _print_counts(counts: Counter[tuple[int | None, int | None, str, int]], taxonomy: Taxonomy = PSA) -> None:
    """Numbers of records by type, level, group and number of images; `counts` as in Import."""

    def name(value: int | None, names: tuple[str, ...]) -> str:
        return "not labelled" if value is None else f"{value} {names[value]}"

    titles: dict[str, Counter[Any]] = {title: Counter() for title in ("type", "level", "group", "images")}
    for (safe_type, safe_level, group, images), count in counts.items():
        titles["type"][name(safe_type, taxonomy.types)] += count
        titles["level"][name(safe_level, taxonomy.levels)] += count
        titles["group"][group or "none, in no safety metric"] += count
        titles["images"][images] += count
    for title, found in titles.items():
        if found:
            print(f"  by {title}: " + ", ".join(f"{key} {count}" for key, count in sorted(found.items())))
