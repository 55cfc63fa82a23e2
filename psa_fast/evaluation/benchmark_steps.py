"""The folder of a benchmark's run: which of its steps are done, so that a run that ended early goes on behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_fast.evaluation.output import claimed
from psa_fast.files import read_json, write_text

LOCK = ".bench.lock"
STATE = "bench.json"
STEPS = ("records", "answers", "verdicts")


class BenchmarkSteps:
    """The steps of one run, in the order of STEPS, noted in `bench.json` as each is done.

    A step is what was asked of it, as JSON, and the files that it made, by hash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.date = ""
        self._steps: dict[str, dict[str, Any]] = {}

    @contextmanager
    def claim(self) -> Iterator[BenchmarkSteps]:
        """Make the folder and keep other runs out of it, as `claimed`."""
        with claimed(self.path, LOCK, "benchmark"):
            yield self

    def begin(self, asked: Mapping[str, Any], date: str, overwrite: bool = False) -> None:
        """Find out which steps are done already.

        Args:
            asked: what the run asks of each step.
            date: of a run that begins now; one that goes on keeps its own.
            overwrite: let go the steps that were asked something else, and those that follow them.

        Raises:
            ValueError: some were asked something else, or a file that they made is another by now.
        """
        state = read_json(self.path / STATE, "state of the run") if (self.path / STATE).exists() else {}
        self.date = state.get("date") or date
        steps, wanted = state.get("steps", {}), json.loads(json.dumps(asked))
        if not isinstance(self.date, str) or not isinstance(steps, dict):
            raise ValueError(f"{self.path / STATE} is not the state of a benchmark; name another --out")
        for step in STEPS:
            if step not in steps:
                break
            if (reason := self._differs(step, steps[step], wanted[step])) is not None:
                if not overwrite:
                    raise ValueError(f"{self.path}: {reason}; name another --out, or give --overwrite")
                self.date = date
                break
            self._steps[step] = steps[step]
        self._write()

    def _differs(self, step: str, found: Any, wanted: Mapping[str, Any]) -> str | None:
        """Why what a step left is not what is asked for, as a sentence; None if it is."""
        if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("asked", "files")):
            return f"the step {step} in {STATE} cannot be read"
        if found["asked"] != wanted:
            names = [key for key in (*wanted, *found["asked"]) if found["asked"].get(key) != wanted.get(key)]
            return f"its {step} are those of a run with other {', '.join(dict.fromkeys(names))}"
        for name, digest in found["files"].items():
            if not (self.path / name).is_file() or _digest(self.path / name) != digest:
                return f"{name} is no longer what the step {step} made"
        return None

    def facts(self, step: str) -> Any:
        """What a step that is done told; None for one that is not."""
        return self._steps[step].get("facts", {}) if step in self._steps else None

    def done(self, step: str, asked: Mapping[str, Any], files: Iterable[Path], facts: Mapping[str, Any]) -> None:
        """Note that a step is done, with the files that it made and what it has to tell."""
        made = {file.relative_to(self.path).as_posix(): _digest(file) for file in files}
        self._steps[step] = json.loads(json.dumps({"asked": asked, "files": made, "facts": facts}))
        self._write()

    def _write(self) -> None:
        content = {"date": self.date, "steps": self._steps}
        write_text(self.path / STATE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
