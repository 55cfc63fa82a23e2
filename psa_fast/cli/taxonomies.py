"""`psa-fast data taxonomies` and `psa-fast data convert`."""

from __future__ import annotations

import argparse
from typing import Any

from psa_fast.data.convert import convert_file
from psa_fast.taxonomy.crosswalk import SHIPPED, read_crosswalk, read_taxonomy


def register(commands: Any) -> None:
    """Add both to the subcommands of `data`."""
    parser = commands.add_parser("taxonomies", help="list the taxonomies that come with psa-fast, or show one")
    parser.add_argument("taxonomy", nargs="?", metavar="NAME|FILE", help="show its classes with their ids")
    parser.set_defaults(func=show_command)

    parser = commands.add_parser("convert", help="turn records of one taxonomy into records of another")
    parser.add_argument("file", metavar="FILE", help="records as .jsonl, or .json with one list")
    add_taxonomy(parser)
    parser.add_argument("--to", required=True, metavar="NAME|FILE", help="the taxonomy to convert to")
    parser.add_argument("--crosswalk", metavar="FILE", help="YAML cross-walk in the place of the shipped one")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl to write")
    parser.set_defaults(func=convert_command)


def add_taxonomy(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what the labels of records are of."""
    parser.add_argument(
        "--taxonomy",
        default="psa",
        metavar="NAME|FILE",
        help=f"what the labels are of: {', '.join(SHIPPED)}, or a YAML file (default: %(default)s)",
    )


def show_command(args: argparse.Namespace) -> int:
    """Print the shipped taxonomies, a line each, or the classes of one."""
    for name in SHIPPED if args.taxonomy is None else (args.taxonomy,):
        taxonomy = read_taxonomy(name)
        levels = ", ".join(taxonomy.levels) if taxonomy.graded else "no levels"
        print(f"{taxonomy.name}: {len(taxonomy.types)} types, {levels}; sha256 {taxonomy.hash}")
        if args.taxonomy is not None:
            for i, kind in enumerate(taxonomy.types):
                print(f"  {i:>3} {kind}" + (" (harmless)" if i == taxonomy.harmless else ""))
    return 0


def convert_command(args: argparse.Namespace) -> int:
    """Write the converted records, and print which types became which."""
    source, target = read_taxonomy(args.taxonomy), read_taxonomy(args.to)
    if source == target:
        raise ValueError(f"--to {args.to} is what the records are of already")
    counts = convert_file(args.file, args.out, read_crosswalk(source, target, args.crosswalk))
    print(f"wrote {counts.total()} records to {args.out}")
    for (old, new), count in sorted(counts.items(), key=lambda item: -item[1]):
        was = "not labelled" if old is None else source.types[old]
        print(f"  {count} x {was} -> {'not labelled' if new is None else target.types[new]}")
    return 0
