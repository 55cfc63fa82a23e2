"""Private names of Python's argparse (3.10 to 3.13)."""

import argparse

#: What `add_subparsers` returns, on which each command registers itself. The class is documented by its method
#: `add_parser` alone; a public name of it would replace this one.
Subcommands = argparse._SubParsersAction
