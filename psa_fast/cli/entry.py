"""The `psa-fast` command: each file of this room registers its own subcommands."""

from __future__ import annotations

import argparse
import io
import os
import sys

from psa_fast import __version__
from psa_fast.files import shorten, shown
from psa_fast.threads import choose_waiting

choose_waiting()
SHARED = ("evaluate", "bench")  # commands that the ranks of a launcher share


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    from psa_fast import train
    from psa_fast.cli import (
        ability,
        bases,
        bench,
        calibrate,
        data,
        evaluation,
        explain,
        export,
        generate,
        judge,
        plan,
        publish,
        report_page,
        robustness,
        sandbox,
        score,
        serve,
    )

    parser = argparse.ArgumentParser(
        prog="psa-fast", description="Concept-bottleneck safety for vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"psa-fast {__version__}")
    # DeepSpeed's launcher puts it before the command; the environment says the same
    parser.add_argument("--local_rank", dest="launched_as", help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        data, bases, sandbox, train, plan, generate, explain, serve, score,
        evaluation, report_page, calibrate, judge, bench, ability, robustness, publish, export,
    ):  # fmt: skip
        command.register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Bad input and a file that cannot be written are one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks must not end a command
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        if args.launched_as is not None and args.command not in SHARED:
            raise ValueError(f"{args.command} is not shared by ranks: start it without the launcher")
        _refuse_nothing(args)
        code = args.func(args)
        if sys.stdout is not None:  # closed by the caller (`>&-`)
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        _silence_stdout()
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"psa-fast: error: {_sentence(error)}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # it was stdout that could not be written
            _silence_stdout()
        return 2
    except ValueError as error:
        print(f"psa-fast: error: {error}", file=sys.stderr)
        return 2


def _refuse_nothing(args: argparse.Namespace) -> None:
    """Refuse a path or name that is empty, which would mean the folder one stands in, or that no file can have.

    What a prompt or a training option may be is said where they are read.
    """
    if args.command in ("train", "plan"):
        return
    for name, given in vars(args).items():
        for text in given if isinstance(given, list) else [given]:
            if isinstance(text, str) and name != "prompt" and (not text or "\0" in text):
                raise ValueError(f"{'FILE' if name == 'file' else f'--{name}'} is {shorten(text)}, which names nothing")


def _silence_stdout() -> None:
    """Keep the interpreter from flushing into stdout again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: OSError) -> str:
    """What could not be read or written, and why, without the error's number."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{shown(os.fsdecode(error.filename))}: {error.strerror}"
