"""Progress on stderr of work that may take minutes; nothing is shown of what is done in a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SILENT = 1.5  # seconds before a terminal shows a bar
LINE_EVERY = 10.0  # seconds between the lines of a log


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Context that gives a function to call with the number of things done.

    Args:
        what: the work, "reading records", say.
        total: things to do, if that is known.
    """
    shown = _Progress(what, total)
    try:
        yield shown.advance
    finally:
        shown.close()


class _Progress:
    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = time.monotonic()
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.next = self.start + (SILENT if self.terminal else LINE_EVERY)
        self.bar: Any = None

    def advance(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            return
        now = time.monotonic()
        if now < self.next:
            return
        if self.terminal:
            self._open_bar()
        elif sys.stderr is not None:
            of = "" if self.total is None else f" of {self.total:,}"
            print(f"{self.what}: {self.done:,}{of}, {now - self.start:.0f} s", file=sys.stderr, flush=True)
            self.next = now + LINE_EVERY

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(self.what, total=self.total, completed=self.done)
        self.bar.start()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
