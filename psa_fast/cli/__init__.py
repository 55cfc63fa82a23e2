"""The command line: one file for each `psa-fast` command, and the one that joins them."""

from psa_fast.cli.entry import build_parser, main

__all__ = ["build_parser", "main"]
