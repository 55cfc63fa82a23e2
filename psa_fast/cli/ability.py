"""`psa-fast ability`: results of lmms-eval with the guard and without it in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from psa_fast.compat.argparse import Subcommands
from psa_fast.files import write_text


def register(subparsers: Subcommands) -> None:
    """Add the command `ability`."""
    parser = subparsers.add_parser(
        "ability",
        help="put results of lmms-eval side by side: base, guard off, guard on",
        description="Print a table of the results that lmms-eval wrote for several settings of one model. Runs of "
        "other tasks, rows or settings are refused.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=PATH", help="a column: results file, or --output_path of a run"
    )
    parser.add_argument("--out", metavar="FILE.md", help="write the table here too")
    parser.set_defaults(func=ability)


def ability(args: argparse.Namespace) -> int:
    """Print the table. Raises ValueError for results that cannot be read or compared."""
    from psa_fast.evaluation.ability_table import ability_table

    columns: dict[str, Path] = {}
    for item in args.runs:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in columns or "|" in name:
            raise ValueError(f"{item}: expected NAME=PATH, each NAME once")
        columns[name] = Path(path)
    table = ability_table(columns)
    print(table, end="")
    if args.out is not None:
        write_text(args.out, table)
    return 0
