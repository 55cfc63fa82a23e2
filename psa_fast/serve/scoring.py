"""Offline verdicts of records or of a folder of pictures, batch by batch into a file that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_fast.data.images import resolve
from psa_fast.data.progress import progress
from psa_fast.data.records import Record
from psa_fast.files import lock, named, parse_json, refuse_pipe_or_folder, shown, write_text
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict

if TYPE_CHECKING:
    from psa_fast.safety.guard import Guard

#: endings of the files of a folder that are taken for pictures; what is none of them is counted, not read
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".ico")


@dataclass(frozen=True)
class Item:
    """Something to score: the row's `id`, where it comes from, and the request."""

    id: str
    where: str
    request: Request


def picture_items(folder: str | Path, question: str) -> tuple[list[Item], int]:
    """The pictures of a folder and its subfolders by their names, each asked `question`, and how many files are none.

    Raises ValueError if there is no folder or no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"--images {shown(root)}: there is no such folder")
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    names = [name for name in files if name.lower().endswith(ENDINGS)]
    if not names:
        raise ValueError(f"--images {shown(root)} holds no picture ({', '.join(ENDINGS)})")
    items = [Item(name, str(root / name), Request(question, (resolve(root, name),))) for name in names]
    return items, len(files) - len(names)


def record_items(records: Sequence[Record], image_folder: str | Path) -> list[Item]:
    """What the users of records ask; the last answer is not read."""
    return [
        Item(
            record.id if record.id is not None else record.where,
            record.where,
            Request(record.turns[:-1], tuple(resolve(image_folder, name) for name in record.images)),
        )
        for record in records
    ]


def digest_of(items: Sequence[Item]) -> str:
    """SHA-256 over the items: their names and turns, and size and time of their pictures."""
    digest = hashlib.sha256()
    for item in items:
        turns = [[turn.role, turn.text] for turn in item.request.turns]
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in item.request.images]  # type: ignore[union-attr]
        digest.update(json.dumps([item.id, turns, files]).encode())
    return digest.hexdigest()


class ScoreFile:
    """The file of verdicts, written as FILE.part until it is complete.

    Args:
        path: of the file.
        run: all that a verdict depends on, as JSON; it is the first line of the unfinished file.
        overwrite: let go what is there of another run.

    Raises:
        ValueError: a finished file is there, or another run's unfinished one, and `overwrite` is False; another
            process writes it.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        for file in (self.path, self.part):
            refuse_pipe_or_folder(file)
        with named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._owner = lock(self.path.with_name(f"{self.path.name}.lock"), f"another run writes {shown(self.path)}")
        if self.path.exists() and not overwrite:
            raise ValueError(f"{shown(self.path)} is complete already; name another --out, or give --overwrite")
        self._head = json.dumps({"run": dict(run)})
        self.rows = self._kept(overwrite)

    def _kept(self, overwrite: bool) -> list[dict[str, Any]]:
        """The rows of the same run that an earlier process left; a last line that was cut short is none."""
        if not self.part.exists():
            return []
        with named(self.part):
            head, *lines = self.part.read_text(encoding="utf-8", errors="replace").split("\n")
        if head != self._head:
            if overwrite or not lines:  # not even its first line is whole: nothing was scored
                return []
            raise ValueError(
                f"{shown(self.part)} is of other data or settings; name another --out, or give --overwrite"
            )
        rows = []
        for number, line in enumerate(lines[:-1], 2):
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise ValueError(f"{self.part}:{number}: {error}; give --overwrite to begin anew") from None
        return rows

    def keep(self, count: int) -> None:
        """Begin the unfinished file with the first `count` of the rows that are there."""
        self.rows = self.rows[:count]
        write_text(self.part, "".join(f"{line}\n" for line in (self._head, *map(json.dumps, self.rows))))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows and hand them to the system."""
        self.rows += rows
        with named(self.part), self.part.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))

    def finish(self) -> None:
        """Give the file its name, without the run's line."""
        write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in self.rows))
        with named(self.part):
            os.unlink(self.part)

    def close(self) -> None:
        """Let go the lock."""
        self._owner.close()


def score(guard: Guard, items: Sequence[Item], file: ScoreFile, batch_size: int) -> Counter[str]:
    """Write the verdict of every item, in their order; return how often each action was taken, "error" for no verdict.

    Whole batches that the file holds already are kept, so that every batch is the one it would have been.
    """
    done = len(file.rows) - len(file.rows) % batch_size if len(file.rows) < len(items) else len(items)
    file.keep(done)
    with progress("scoring", len(items)) as advance:
        advance(done)
        for start in range(done, len(items), batch_size):
            batch = items[start : start + batch_size]
            verdicts = guard.verdicts([item.request for item in batch], batch_size=batch_size)
            file.append([_row(item, verdict) for item, verdict in zip(batch, verdicts, strict=True)])
            advance(len(batch))
    file.finish()
    return Counter("error" if row["verdict"]["error"] else row["verdict"]["action"] for row in file.rows)


def _row(item: Item, verdict: Verdict) -> dict[str, Any]:
    return {"id": item.id, "verdict": verdict.to_json()}
