"""`psa-fast score` writes the guard's verdict of every record of a file, or of every picture of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from psa_fast.compat.argparse import Subcommands


def register(subparsers: Subcommands) -> None:
    """Add the command `score`."""
    parser = subparsers.add_parser(
        "score",
        help="verdicts of a file of records or a folder of pictures, without answers",
        description="Write the guard's verdict of every record or picture to a JSONL file. The same command begun "
        "again goes on where it was cut short.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="add-on folder (psa_config.json, psa.safetensors)"
    )
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument("--policy", metavar="FILE", help="policy YAML (default: the shipped one)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help="records (docs/data.md); their last answer is not read")
    what.add_argument("--images", metavar="DIR", help="pictures, in subfolders too")
    parser.add_argument("--image_folder", metavar="DIR", help="where --data's image paths start (default: its folder)")
    parser.add_argument("--question", metavar="TEXT", help='asked of each of --images (default: "What do you see?")')
    parser.add_argument("--out", required=True, metavar="FILE", help="one line for each: id and verdict")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="read together (default: 16)")
    parser.add_argument("--overwrite", action="store_true", help="let go what --out holds of another run")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Score everything. Raises ValueError, with a sentence, for what cannot be scored."""
    from psa_fast.data.records import load_records
    from psa_fast.safety.policy import Policy
    from psa_fast.serve.scoring import ScoreFile, digest_of, picture_items, record_items, score

    for option, other in (("question", "images"), ("image_folder", "data")):
        if getattr(args, option) is not None and getattr(args, other) is None:
            raise ValueError(f"--{option} goes with --{other}")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}; expected at least 1")
    policy = Policy.load(args.policy)
    if args.images is not None:
        items, others = picture_items(args.images, args.question or "What do you see?")
        if others:
            print(f"{others} files of {args.images} are no pictures by their names and are left out")
    else:
        folder = args.image_folder or Path(args.data).parent
        items = record_items(load_records(args.data, folder, decode=False, taxonomy=policy.taxonomy), folder)

    from psa_fast.safety.load import base_of, checked_hash, load_guard

    base = base_of(args.model) if args.base is None else args.base
    depends = {
        "data": digest_of(items),
        "model": checked_hash(args.model),
        "base": str(base),
        "policy": policy.hash,
        "batch_size": args.batch_size,
    }
    file = ScoreFile(args.out, depends, args.overwrite)
    try:
        if file.rows:
            print(f"{len(file.rows)} of {len(items)} are there already")
        counts = score(load_guard(args.model, base, policy), items, file, args.batch_size)
    finally:
        file.close()
    print(
        f"{args.out}: {len(items)} verdicts, " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    )
    return 0
