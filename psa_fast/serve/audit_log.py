"""The audit log: what was decided about which request, without a byte of what it said."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from psa_fast.files import lock, named, refuse_pipe_or_folder, shown
from psa_fast.safety.reading import Reading
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict

VERSION = 1
#: of a verdict, what can hold nothing of the request; the fault of one that cannot be read may quote it
_KEPT = (
    "checked",
    "applied",
    "unsafe",
    "action",
    "code",
    "type",
    "level",
    "unsafe_score",
    "type_probs",
    "level_probs",
    "query",
    "query_number",
    "query_span",
    "picture",
    "words_alone",
    "intervention",
    "accumulated",
)


class AuditLog:
    """A file of JSON lines, one for each verdict that was given.

    Args:
        path: of the file; rows are added to one that is there.
        max_mb: MiB from which it is renamed, by the time, and a new one begun; no file is ever removed.

    Raises:
        ValueError: another process writes there, or it is a folder or pipe.
        OSError: naming the path, if it cannot be opened.
    """

    def __init__(self, path: str | Path, max_mb: int = 100) -> None:
        self.path, self.most = Path(path), max_mb * 2**20
        refuse_pipe_or_folder(self.path)
        with named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.lock")
        self._owner = lock(beside, f"another process writes the audit log {shown(self.path)}; name another --audit")
        self._writing = threading.Lock()
        with named(self.path):
            self._file = self._open()

    def _open(self) -> int:
        # readable by its owner alone; a line that a kill cut short is ended, so that the next one stands by itself
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
        return file

    def write(self, row: dict[str, Any]) -> None:
        """Add a row and hand it to the system whole. Raises OSError, naming the file."""
        line = (json.dumps(row) + "\n").encode()
        with self._writing, named(self.path):
            if os.fstat(self._file).st_size + len(line) > self.most and os.fstat(self._file).st_size:
                self._rotate()
            if os.write(self._file, line) != len(line):
                raise OSError("the row was not written whole (no space left?)")

    def _rotate(self) -> None:
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
        number = 0
        while (old := self.path.with_name(f"{self.path.name}.{stamp}-{number}")).exists():
            number += 1
        os.rename(self.path, old)
        file = self._open()
        os.close(self._file)
        self._file = file

    def close(self) -> None:
        """Let go the file and its lock."""
        os.close(self._file)
        self._owner.close()


def audit_row(
    endpoint: str, key: str | None, request: Request, verdict: Verdict, seconds: dict[str, float], shadow: bool = False
) -> dict[str, Any]:
    """The row of a verdict.

    Args:
        endpoint: the path that was asked.
        key: the short name of the API key, None where none is needed.
        request: hashed, never kept: its pictures' bytes, and its turns as JSON.
        verdict: what was decided.
        seconds: latency by part.
        shadow: whether the verdict is a shadow policy's, which was not applied.
    """
    turns = json.dumps([[turn.role, turn.text] for turn in request.turns]).encode()
    images = [image for image in request.images if isinstance(image, bytes)]
    said = verdict.to_json()
    return {
        "version": VERSION,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "endpoint": endpoint,
        "key": key,
        "text_sha256": hashlib.sha256(turns).hexdigest(),
        "image_sha256": [hashlib.sha256(image).hexdigest() for image in images],
        "policy": verdict.policy_hash,
        "model": verdict.model_hash,
        "shadow": shadow,
        "rule": verdict.rule if verdict.error is None else None,
        **{name: said[name] for name in _KEPT},
        "readings": [_reading(reading) for reading in verdict.readings],
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }


def _reading(reading: Reading) -> dict[str, Any]:
    """A reading, with null for what is no number: replay (replay.py) decides on it again."""
    logits = [value if math.isfinite(value) else None for value in reading.logits or ()]
    return {
        "query": reading.query,
        "number": reading.number,
        "span": reading.span,
        "picture": reading.picture,
        "words_alone": reading.words_alone,
        "logits": logits,
    }
