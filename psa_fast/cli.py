"""The `psa-fast` command: each room registers its own subcommands."""

from __future__ import annotations

import argparse
import sys


def build_parser() -> argparse.ArgumentParser:
    """The parser with every room's subcommands."""
    from psa_fast.data import commands as data
    from psa_fast.evaluation import commands as evaluation
    from psa_fast.safety import commands as safety
    from psa_fast.sandbox import commands as sandbox

    parser = argparse.ArgumentParser(prog="psa-fast", description="Concept-bottleneck safety for vision-language models.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (data, sandbox, safety, evaluation):
        room.register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Bad input is one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.func(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"psa-fast: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
