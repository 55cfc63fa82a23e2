"""What all judges share: a time limit, and what a message for a user looks like."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

LIMIT_S = 10


class TooLongError(BaseException):
    """Not an Exception: no handler of the code under test may take it for its own."""


@contextlib.contextmanager
def limit(seconds: int = LIMIT_S) -> Iterator[None]:
    """Raise TooLongError after `seconds`, in the main thread; also where C code held the signal back till it ended."""
    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if time.monotonic() - start > seconds:
        raise TooLongError


def _too_long(*_: object) -> None:
    raise TooLongError


def no_sentence(message: str, path: object, most: int = 400) -> str | None:
    """Why a message is none that a user can use, None if it is one: it names the file, on one line, in few words."""
    if str(path) not in message:
        return f"the message names no file: {message[:200]!r}"
    if "\n" in message or len(message) > len(str(path)) + most:
        return f"{len(message)} characters or several lines: {message[:200]!r}"
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"cannot be printed: {message[:200]!a}"
    return None
