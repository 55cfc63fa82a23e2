"""The folder of an evaluation: one run at a time, answers kept as they come, no older report lost by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from psa_fast.files import lock, named, parse_json, read_json, refuse_pipe_or_folder, write_text

LOCK = ".evaluate.lock"
REPORT = "report.json"
BEGUN = ".evaluate.json"


@contextmanager
def claimed(path: Path, lock_name: str, what: str) -> Iterator[None]:
    """Context in which a folder, made here, is kept from other runs of a kind, `what` in words.

    Raises OSError if nothing can be written there, ValueError if another run is at it.
    """
    with named(path):
        path.mkdir(parents=True, exist_ok=True)
    with lock(path / lock_name, f"another {what} is under way in {path}; give this one an --out of its own"):
        yield


class OutputFolder:
    """The folder --out, claimed by this run for as long as `claim` lasts.

    Answers are appended to `answers-STAGE.jsonl.part` batch by batch, so that a run which ends early leaves what it
    had, and the same run begun again goes on from there (`begin`, `kept`). `complete` puts them into the order of the
    records, and `finish` gives all of them their names at once, when every stage is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: list[str] = []
        self._old_stages: list[str] = []
        self._resumes = False

    @contextmanager
    def claim(self) -> Iterator[OutputFolder]:
        """Make the folder and keep other runs out of it, as `claimed`."""
        with claimed(self.path, LOCK, "evaluation"):
            yield self

    def check_older_report(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Raise ValueError for a report that was asked for with other settings, or by an older version, unless told to.

        With `finish` the answers of its stages go.
        """
        file = self.path / REPORT
        if not file.exists():
            return
        try:
            report = read_json(file, "report")
        except ValueError:
            report = {}
        provenance, stages = report.get("provenance"), report.get("stages")
        kept = provenance.get("settings") if isinstance(provenance, dict) else None
        if not overwrite and kept != json.loads(json.dumps(settings)):
            raise ValueError(f"{file} is of other data or settings; name another --out, or give --overwrite")
        self._old_stages = [name for name in stages if Path(name).name == name] if isinstance(stages, dict) else []

    def begin(self, run: Mapping[str, Any], overwrite: bool = False) -> bool:
        """Note which run this is; return whether the same one began here before and did not end.

        Args:
            run: all that an answer depends on, as JSON: two runs with the same give the same answers.
            overwrite: let go what another run left unfinished.

        Raises:
            ValueError: another run left answers, which must not be taken for this one's, and `overwrite` is False.
        """
        note = self.path / BEGUN
        wanted = json.loads(json.dumps(run))
        try:
            begun = read_json(note, "note of the run")
        except ValueError:  # absent or cut short: nothing can be said of the answers that lie here
            begun = {}
        self._resumes = begun == wanted
        if not self._resumes:
            parts = sorted(self.path.glob(self._part("*").name))
            for part in parts:
                refuse_pipe_or_folder(part)
            if not overwrite and any(part.stat().st_size for part in parts):
                differs = ", ".join(key for key in wanted if begun.get(key) != wanted[key])
                raise ValueError(
                    f"{self.path} holds answers of a run that was cut short and differs in {differs}; "
                    "name another --out, or give --overwrite to begin anew"
                )
            with named(self.path):
                for part in parts:
                    part.unlink()
            write_text(note, json.dumps(wanted) + "\n")
        return self._resumes

    def kept(self, stage: str) -> list[dict[str, Any]]:
        """The rows of a stage that the run which `begin` found had kept; a last line that was cut short is none.

        Raises ValueError, naming the file, for anything else that is no row.
        """
        part = self._part(stage)
        if not self._resumes or not part.exists():
            return []
        refuse_pipe_or_folder(part)
        with named(part):
            *lines, _ = part.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line.decode("utf-8"), constants=True)
            except ValueError as error:
                raise ValueError(f"{part}:{number}: {error}; remove the file to begin anew") from None
            if not isinstance(row, dict):
                raise ValueError(f"{part}:{number}: not an answer; remove the file to begin anew")
            rows.append(row)
        return rows

    def shares(self, stage: str) -> list[str]:
        """The names, as of stages, of what other ranks than the first keep of a stage; see `share`."""
        parts = self.path.glob(self._part(self.share(stage, "*")).name)
        return sorted(part.name.removeprefix("answers-").removesuffix(".jsonl.part") for part in parts)

    @staticmethod
    def share(stage: str, rank: int | str) -> str:
        """The name, as of a stage, of what a rank keeps of a stage; that of the first is the stage's own."""
        return stage if rank == 0 else f"{stage}.rank{rank}"

    def merge(self, stage: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put the rows of a stage, those of all ranks, in the place of what each rank kept."""
        self.complete(stage, rows)
        with named(self.path):
            for share in self.shares(stage):
                self._part(share).unlink()

    @contextmanager
    def answers(self, stage: str, kept: Iterable[Mapping[str, Any]] = ()) -> Iterator[TextIO]:
        """The open file of a stage's answers, which begins with the rows `kept`; write to it with `append`."""
        part = self._part(stage)
        refuse_pipe_or_folder(part)
        if rows := list(kept):
            write_text(part, _lines(rows))  # whole or not at all: a kill here loses none of them
        with named(part):
            stream = part.open("a" if rows else "w", encoding="utf-8", newline="\n")
        self._stages.append(stage)
        try:
            yield stream
        except BaseException:
            with suppress(OSError):  # closing tries once more to write what could not be written
                stream.close()
            raise
        with named(part):
            stream.close()

    @staticmethod
    def append(stream: TextIO, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a stage's answers and hand them to the system."""
        with named(stream.name):
            stream.write(_lines(rows))
            stream.flush()

    def complete(self, stage: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put the rows of a stage, all of them, in the place of those that were appended as they came."""
        write_text(self._part(stage), _lines(rows))

    def finish(self) -> None:
        """Give the answers of every stage their names; those of the older report's other stages go."""
        with named(self.path):
            for stage in set(self._old_stages) - set(self._stages):
                (self.path / self._name(stage)).unlink(missing_ok=True)
            for stage in self._stages:
                os.replace(self._part(stage), self.path / self._name(stage))
            (self.path / BEGUN).unlink(missing_ok=True)

    @staticmethod
    def _name(stage: str) -> str:
        return f"answers-{stage}.jsonl"

    def _part(self, stage: str) -> Path:
        return self.path / f"{self._name(stage)}.part"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
