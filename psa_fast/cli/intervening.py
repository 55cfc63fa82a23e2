"""The options that set, clear or clip a concept by hand."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from psa_fast.files import shorten

if TYPE_CHECKING:
    from psa_fast.safety.intervention import Intervention

KINDS = ("set", "clear", "clip")


def add_intervention(parser: argparse.ArgumentParser) -> None:
    """Add --set, --clear and --clip, of which one may be given."""
    parser.add_argument(
        "--set", nargs="+", metavar="CONCEPT", help="read it as type=NAME, level=NAME or both, whatever was read"
    )
    parser.add_argument(
        "--clear", nargs="*", metavar="CONCEPT", help="read no type=NAME, no level=NAME; without either no risk at all"
    )
    parser.add_argument(
        "--clip", nargs="+", metavar="CONCEPT",
        help="as --clear, but down to a probability only: --clip type=privacy 0.3, or --clip 0.3 for all risk",
    )  # fmt: skip


def intervention_of(args: argparse.Namespace) -> Intervention | None:
    """The intervention that the options ask for. Raises ValueError, naming the option, for what is none."""
    given = [kind for kind in KINDS if getattr(args, kind) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} cannot be given together")
    from psa_fast.safety.intervention import Intervention

    kind, found, most = given[0], {}, None
    items: list[str] = getattr(args, kind)
    for item in items:
        what, equals, name = item.partition("=")
        if kind == "clip" and not equals and most is None:
            try:
                most = float(item)
            except ValueError:
                raise ValueError(f"--clip {shorten(item, 40)}: expected a number, type=NAME or level=NAME") from None
        elif what not in ("type", "level") or not equals or what in found:
            raise ValueError(f"--{kind} {shorten(item, 40)}: expected type=NAME, level=NAME or one of each")
        else:
            found[what] = name.replace("-", " ").replace("_", " ")
    try:
        return Intervention(kind, found.get("type"), found.get("level"), most)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"--{kind}: {str(error).removeprefix(f'{kind}: ')}") from None
