"""The `psa-fast` command: each room registers its own subcommands."""

from __future__ import annotations

import argparse
import os
import sys

# before torch is imported: threads that spin while they wait starve each other where jobs share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every room's subcommands."""
    from psa_fast import train
    from psa_fast.data import commands as data
    from psa_fast.evaluation import commands as evaluation
    from psa_fast.safety import commands as safety
    from psa_fast.sandbox import commands as sandbox
    from psa_fast.training import commands as training

    parser = argparse.ArgumentParser(
        prog="psa-fast", description="Concept-bottleneck safety for vision-language models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (data, sandbox, train, training, safety, evaluation):
        room.register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Bad input is one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        code = args.func(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader (`| head`) has seen enough; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"psa-fast: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
