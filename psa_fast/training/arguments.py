"""The training options as command-line arguments, for `train.py`, `psa-fast train` and `psa-fast plan`.

Plain argparse: `--help` and a mistyped option then answer without torch or transformers.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from .options import GROUPS, OPTIONS, kind_of

WIDTH = 120
USAGE = "%(prog)s [--stage {0,1,2}] [--recipe NAME] [--OPTION VALUE ...]"
_EPILOG = """\
A recipe's values take the place of the defaults above, the command line's those of the recipe. --OPTION alone,
--OPTION True and --OPTION False set a switch; hyphens do for underscores.

  python train.py --stage 1                         one process, without the launcher
  deepspeed --num_gpus 2 train.py --stage 1         two GPUs, or two processes on a machine without any
  psa-fast train --stage 1 [--num_gpus 2]           the same where only the package is installed"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are ValueErrors of one sentence: under a launcher one rank prints for all."""

    def error(self, message: str) -> NoReturn:
        """Raise what would be printed with the usage otherwise."""
        raise ValueError(message)


class OneLine(argparse.RawDescriptionHelpFormatter):
    """One line an option, whatever the terminal's width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=WIDTH)


def build_parser(prog: str) -> Parser:
    """Return the parser of `train.py`; what it reads are texts, see `options.from_text`."""
    parser = Parser(
        prog=prog,
        usage=USAGE,
        description="Train PSA-VLM: stage 1, then stage 2. Without options the sandbox recipe runs.",
        epilog=_EPILOG,
        formatter_class=OneLine,
        allow_abbrev=False,
    )
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option, in the groups of `--help`."""
    for title in GROUPS:
        group = parser.add_argument_group(title)
        add_group(group, (name for name, field in OPTIONS.items() if field.metadata["group"] == title))


def add_group(group: Any, names: Iterable[str]) -> None:
    """Add options by name; only those typed end up in the namespace, as texts."""
    for name in names:
        field, hyphens = OPTIONS[name], name.replace("_", "-")
        facts = field.metadata
        shared: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        bare: dict[str, Any] = {"nargs": "?", "const": "True"} if kind_of(name) == "bool" else {}
        help_line = argparse.SUPPRESS if facts.get("hidden") else describe(name)
        group.add_argument(f"--{name}", metavar=_metavar(name), help=help_line, **shared, **bare)
        hidden = {"help": argparse.SUPPRESS, **shared}
        if hyphens != name:
            group.add_argument(f"--{hyphens}", **hidden, **bare)
        if field.default is True:
            for form in dict.fromkeys((f"--no_{name}", f"--no-{hyphens}")):
                group.add_argument(form, action="store_const", const="False", **hidden)


def describe(name: str) -> str:
    """Return an option's line of help: what it is, its values and its default."""
    facts, default = OPTIONS[name].metadata, OPTIONS[name].default
    choices = f": {', '.join(map(str, facts['choices']))}" if "choices" in facts and name != "stage" else ""
    shown = facts.get("unset", "none") if default is None else f"{default:g}" if kind_of(name) == "float" else default
    off = f"; --no_{name}" if default is True else ""
    return f"{facts['help']}{choices} (default: {shown}{off})".replace("%", "%%")


def _metavar(name: str) -> str:
    if name == "stage":
        return "{0,1,2}"
    return {"int": "N", "float": "X", "bool": "BOOL", "str": "VALUE"}[kind_of(name)]


def typed_options(argv: list[str] | None, prog: str) -> dict[str, str]:
    """Return the options that a command line names, as texts.

    Raises:
        ValueError: an option that does not exist, or one without its value.
    """
    known, unknown = build_parser(prog).parse_known_args(argv)
    refuse_unknown(unknown)
    return dict(vars(known))


def refuse_unknown(words: list[str]) -> None:
    """Raise ValueError for words of a command line that are no option, with the nearest one there is."""
    if not words:
        return
    word = words[0].split("=")[0]
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), OPTIONS, n=1)
    hint = f"; did you mean --{near[0]}?" if near and word.startswith("-") else "; --help lists them"
    raise ValueError(f"{word[:80]} is not an option{hint}")
