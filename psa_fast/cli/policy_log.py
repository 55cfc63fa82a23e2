"""`psa-fast policy replay` and `policy diff` decide the rows of an audit log again; no model is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.serve.replay import Comparison

LISTED = 20


def register(subparsers: Subcommands) -> None:
    """Add `replay` and `diff` to the subcommands of `policy`."""
    replay = subparsers.add_parser("replay", help="decide an audit log again, under the policy it was decided under")
    replay.add_argument("log", metavar="LOG", help="of `psa-fast serve --audit`")
    replay.add_argument("--policy", metavar="FILE", help="policy YAML (default: the shipped one)")
    replay.set_defaults(func=run_replay)
    diff = subparsers.add_parser("diff", help="what of an audit log two policies decide differently")
    diff.add_argument("old", metavar="OLD", help="policy YAML")
    diff.add_argument("new", metavar="NEW", help="policy YAML")
    diff.add_argument("--records", required=True, metavar="LOG", help="of `psa-fast serve --audit`")
    diff.set_defaults(func=run_diff)


def run_replay(args: argparse.Namespace) -> int:
    """Print how a log is decided again; exit code 1 where a row comes out differently."""
    from psa_fast.safety.policy import Policy
    from psa_fast.serve.replay import replay

    return _report(replay(args.log, Policy.load(args.policy)), failure=1)


def run_diff(args: argparse.Namespace) -> int:
    """Print what two policies decide differently."""
    from psa_fast.safety.policy import Policy
    from psa_fast.serve.replay import difference

    return _report(difference(args.records, Policy.load(args.old), Policy.load(args.new)), failure=0)


def _report(found: Comparison, failure: int) -> int:
    print(f"{found.rows} rows, {found.same} the same, {len(found.lines)} different")
    for (before, after), count in sorted(found.changes.items()):
        print(f"{before:<7} -> {after:<7} {count}" + ("  (another type or level)" if before == after else ""))
    if found.lines:
        more = f" and {len(found.lines) - LISTED} more" if len(found.lines) > LISTED else ""
        print(f"lines {', '.join(map(str, found.lines[:LISTED]))}{more}")
    return failure if found.lines else 0
