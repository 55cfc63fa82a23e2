"""Importers: one module per public dataset, which turns it into our rows and keeps the source's own label verbatim.

A dataset that comes as a folder is a module NAME beside `NAME.yaml`, the table of its categories, with
- `HELP`, what it reads, and `LICENCE`, the source's own, or None where its card names none;
- `SPLITS`, the splits it is published with and their numbers of entries, None where that is not known;
- `entries(source)`, which yields the raw rows (`psa_fast.data.importers.source.Entry`) of the splits asked for;
- `records(source, entry)`, which yields the rows of ours of one entry, or raises `BadRow`.

`figstep`, `psa` and `records` come as files of any name: they have `HELP`, `add_arguments(parser)` and `read(args)`,
which returns a `SourceRow` for each row of the source. Both kinds raise ValueError only for what spoils the whole
source: a file that is absent, a column that is missing. Everything else, from the checks to the report, is
`import_rows` (psa_fast.data.importers.writing) and the same for all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

#: the modules' names, which are those on the command line
IMPORTERS = (
    "beavertails_v", "figstep", "hateful_memes", "holisafe", "jailbreakv", "llava_instruct", "mm_safetybench",
    "mossbench", "mssbench", "psa", "records", "rtvlm", "siuo", "spa_vl", "unsafebench", "vlguard", "vlsbench",
    "xstest",
)  # fmt: skip


class SourceRow(NamedTuple):
    """A row of the source as a row of ours, or the reason why there is none.

    `kind` is the part of the reason that many rows may share, as in Problem.
    """

    path: str
    line: int
    row: dict[str, Any] | None = None
    error: str | None = None
    kind: str = ""


class BadRow(ValueError):
    """A row of the source that cannot be a record; `kind` as in `SourceRow`."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def load_importer(name: str) -> Any:
    """Return the module of an importer, one of IMPORTERS."""
    return import_module(f"{__name__}.{name}")
