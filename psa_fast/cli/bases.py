"""`psa-fast base list` and `base check MODEL`: which base models work, and whether a given one does."""

from __future__ import annotations

import argparse
from typing import Any

from psa_fast.compat.argparse import Subcommands


def register(subparsers: Subcommands) -> None:
    """Add `base` with its two commands; each sets `func`, which returns the exit code."""
    parser = subparsers.add_parser("base", help="which base models are supported, and whether one works")
    commands = parser.add_subparsers(dest="base_command", required=True, metavar="{list,check}")
    listed = commands.add_parser("list", help="print the families of models and what works with each")
    listed.set_defaults(func=_list)
    check = commands.add_parser("check", help="load a base and compare what psa-fast does with it to its own forward")
    check.set_defaults(func=_check)
    check.add_argument("model", metavar="MODEL", help="folder or hub name")
    check.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")


def _list(_args: argparse.Namespace) -> int:
    print("\n".join(support_table()))
    return 0


def support_table() -> list[str]:
    """Lines of a Markdown table: a family each, and which of `families.PARTS` work with it."""
    from psa_fast.models.families import FAMILIES, PARTS

    rows = [["family (model_type)", *PARTS], ["---"] * (1 + len(PARTS))]
    for name, family in FAMILIES.items():
        rows.append([f"`{name}`", *("yes" if part in family.works else "not yet" for part in PARTS)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _check(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from psa_fast.cli.base_checks import check_base_model

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, found = check_base_model(args.model, dtype, device)
    print(f"{args.model}: {family}, {args.dtype} on {device.type}")
    table = Table()
    for column in ("what must hold", "", "found"):
        table.add_column(column)
    for one in found:
        table.add_row(one.name, "ok" if one.good else "FAILED", one.found)
    console: Any = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    failed = [one.name for one in found if not one.good]
    print(f"{len(failed)} of {len(found)} checks failed" if failed else f"all {len(found)} checks hold")
    return 1 if failed else 0
