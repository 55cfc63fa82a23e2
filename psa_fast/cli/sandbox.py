"""`psa-fast sandbox data`, `base` and `picture`: a world, a base, and a picture of what a guard did with a world."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from psa_fast.compat.argparse import Subcommands
from psa_fast.files import named
from psa_fast.training.options import EMBEDDED


def register(subparsers: Subcommands) -> None:
    """Add `sandbox` with its three commands; each sets `func`, which returns the exit code."""
    parser = subparsers.add_parser("sandbox", help="draw a sandbox world, or train the sandbox's base model")
    commands = parser.add_subparsers(dest="sandbox_command", required=True, metavar="{data,base,picture}")
    data = commands.add_parser("data", help="draw a world: pictures and JSONL records (about 20 seconds)")
    data.set_defaults(func=_data)
    data.add_argument(
        "--split", action="append", choices=("train", "dev", "test"),
        help="draw this split alone, as it is in the whole world; may be given several times (default: all)",
    )  # fmt: skip
    base = commands.add_parser("base", help="train the base model (about 7 minutes on 2 cores)")
    base.set_defaults(func=_base)
    base.add_argument(
        "--policy", metavar="FILE", help="policy file whose hints the base learns (default: the shipped one)"
    )
    for command, made in ((data, "world"), (base, "base")):
        command.add_argument(
            "--name", choices=EMBEDDED, default=EMBEDDED[0],
            help=f"which of the two embedded {made}s, by the name that train.py knows it by (default: {EMBEDDED[0]})",
        )  # fmt: skip
        command.add_argument("--seed", type=int, default=0, help=f"the same seed gives the same {made} (default: 0)")
        command.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    picture = commands.add_parser("picture", help="draw requests of a world with the answers that an evaluation kept")
    picture.set_defaults(func=_picture)
    picture.add_argument("--run", required=True, metavar="DIR", help="answers-base.jsonl, answers-stage2.jsonl")
    picture.add_argument("--data", required=True, metavar="WORLD", help="the world that was evaluated (its test split)")
    picture.add_argument("--out", required=True, metavar="FILE", help="a PNG; replaced if it is there")


def _data(args: argparse.Namespace) -> int:
    from psa_fast.sandbox.draw import draw_world
    from psa_fast.sandbox.english_rows import ROWS, draw_english_rows

    other: dict[str, Any] = {} if args.name == "sandbox" else {"rows": ROWS, "draw": draw_english_rows}
    with named(args.out):
        summary = draw_world(args.seed, Path(args.out), splits=args.split, **other)
    counts = ", ".join(f"{name} {sum(rows.values())}" for name, rows in summary["rows"].items())
    print(f"{args.out}: world of seed {args.seed}; rows: {counts}")
    return 0


def _base(args: argparse.Namespace) -> int:
    from psa_fast.safety.policy import Policy
    from psa_fast.sandbox import smollm2
    from psa_fast.sandbox.base import train_base
    from psa_fast.sandbox.draw import check_seed

    check_seed(args.seed)
    train = train_base if args.name == "sandbox" else smollm2.train_smollm2_base
    hint_for = Policy.load(args.policy).hint
    with named(args.out):
        Path(args.out).mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
        losses = train(Path(args.out), args.seed, hint_for)
    print(f"{args.out}: base of seed {args.seed}; " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
    return 0


def _picture(args: argparse.Namespace) -> int:
    from psa_fast.sandbox.picture import draw_picture

    draw_picture(Path(args.data), Path(args.run), Path(args.out))
    print(f"{args.out}: {Path(args.out).stat().st_size // 1024} KB")
    return 0
