"""SIGTERM and Ctrl-C as a request to stop."""

from __future__ import annotations

import signal
from typing import Any


class StopFlag:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after a step; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = self.requested or signal.Signals(number).name  # the launcher answers Ctrl-C with SIGTERM
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
