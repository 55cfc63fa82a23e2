"""Replies of judging models, kept by what was asked: one append-only JSONL file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psa_fast.evaluation.judges.contract import Reply
from psa_fast.files import lock, named, parse_json, refuse_pipe_or_folder


class ReplyCache:
    """Replies by key. A reply is written as soon as it is there, so that a run which ends early asks nothing twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, Reply] = {}
        self._writing = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[ReplyCache]:
        """Read the file and keep other runs from it.

        A last line without its end was cut short by a kill: it goes. Raises ValueError, with file and line, for any
        other line that is no reply, and if another run is at the file; OSError if it cannot be written.
        """
        refuse_pipe_or_folder(self.path)
        with named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        busy = f"another run is writing to {self.path}; give this one a --cache of its own"
        with lock(self.path.with_name(f".{self.path.name}.lock"), busy):
            with named(self.path):
                self._read()
                self._stream = self.path.open("a", encoding="utf-8", newline="\n")
            with self._stream:
                yield self

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = parse_json(line.decode("utf-8"))
                logprobs = tuple((str(token), float(value)) for token, value in row["logprobs"])
                self._replies[row["key"]] = Reply(str(row["text"]), logprobs)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}:{number}: no reply of a judge ({error})") from None
        if len(whole) < len(data):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))

    def get(self, key: str) -> Reply | None:
        """The reply of a key; None if there is none yet."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; any thread may."""
        line = json.dumps({"key": key, "text": reply.text, "logprobs": reply.logprobs}) + "\n"
        with self._writing, named(self.path):
            self._stream.write(line)
            self._stream.flush()
            self._replies[key] = reply
