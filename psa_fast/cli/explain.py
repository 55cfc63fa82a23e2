"""`psa-fast explain` tells why the guard did what it did to one request, in words, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast.cli.generate import add_request, guard_for
from psa_fast.cli.intervening import add_intervention, intervention_of
from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.safety.request import Request


def register(subparsers: Subcommands) -> None:
    """Add the command `explain`."""
    parser = subparsers.add_parser(
        "explain",
        help="tell why the guard did what it did to a request, and what would change it",
        description="Read one request as `psa-fast generate` does and tell which reading, concept, rule and threshold "
        "decided, where the concept head looked, and the nearest change of each concept that would have led to "
        "another action. No answer is written.",
    )
    add_request(parser, required=False)
    parser.add_argument(
        "--request", metavar="FILE", help="in place of --prompt and --image: JSON, the body of a chat completion"
    )
    add_intervention(parser)
    parser.add_argument("--picture", metavar="FILE", help="write an SVG of it, which shows where the readings looked")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=explain_request)


def explain_request(args: argparse.Namespace) -> int:
    """Print the explanation. Raises ValueError, with a sentence, for input that cannot be used."""
    if (args.prompt is None) is (args.request is None):
        raise ValueError("give either --prompt, with its --image files, or --request FILE")
    if args.request is not None and args.image:
        raise ValueError("--image goes with --prompt; the pictures of --request are in its file")
    if args.picture is not None and Path(args.picture).suffix.lower() != ".svg":
        raise ValueError(f"--picture {args.picture}: the picture is an SVG; give a name that ends in .svg")

    from psa_fast.safety.request import Request

    asked = read_request(args.request) if args.request else Request(args.prompt, tuple(map(Path, args.image)))
    if (intervention := intervention_of(args)) is not None:
        asked = replace(asked, intervention=intervention)
    guard, request = guard_for(args, asked, 1)

    from psa_fast.files import write_text
    from psa_fast.safety.explanation import explain

    found = explain(guard, request)
    if args.picture is not None:
        from psa_fast.safety.overlay import explanation_svg

        write_text(Path(args.picture), explanation_svg(found))
    if args.json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(found.lines()))
    return 0


def read_request(file: str) -> Request:
    """The request of a file with the body of a chat completion, as a server takes it.

    Raises ValueError, naming the file, for what the server would refuse.
    """
    from psa_fast.files import read_json
    from psa_fast.serve.chat_completions import read_chat
    from psa_fast.serve.settings import ServerSettings
    from psa_fast.serve.wire_errors import ApiError

    settings = ServerSettings()
    body = read_json(Path(file), "request")
    try:
        # whichever model the body names, the one of --model is asked
        return read_chat(body | {"model": settings.model_name}, settings).request
    except ApiError as error:
        raise ValueError(f"request {file}: {error.message}") from None
