"""`psa-fast report`: the page of a finished evaluation, made again from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from psa_fast.compat.argparse import Subcommands


def register(subparsers: Subcommands) -> None:
    """Add the command `report`."""
    parser = subparsers.add_parser(
        "report",
        help="make an evaluation's report.html again from its files; loads no model",
        description="Write DIR/report.html from the report.json and the answers-STAGE.jsonl that psa-fast evaluate "
        "left there. No model is loaded.",
    )
    parser.add_argument("folder", metavar="DIR", help="the --out of psa-fast evaluate")
    parser.add_argument(
        "--image_folder", metavar="DIR", help="where image paths start (default: where the evaluation found them)"
    )
    parser.set_defaults(func=report)


def report(args: argparse.Namespace) -> int:
    """Write the page. Raises ValueError, with a sentence, for files that are not an evaluation's."""
    from psa_fast.evaluation.report_html import write_page

    folder, images = Path(args.folder), args.image_folder
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"--image_folder {images}: there is no such folder")
    page = write_page(folder, None if images is None else Path(images))
    print(f"wrote {page.path}")
    if page.missing:
        found = f"{page.missing} pictures were not found" if page.found else "no picture was found"
        print(f"{found} in {page.image_folder}; --image_folder names another place")
    return 0
