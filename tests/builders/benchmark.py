"""A small benchmark in MSSBench's raw layout, in the words of the tiny base, and runs of `psa-fast bench` on it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from builders import tiny
from builders.raw_layouts import mss, png, put

DATE = "2026-01-01T00:00:00+00:00"


def build_source(folder: Path, pairs: int = 8) -> Path:
    """`pairs` requests, each with a harmless and a harmful picture."""
    rows = []
    for number in range(pairs):
        names = f"{number}-safe.png", f"{number}-unsafe.png"
        for shade, name in enumerate(names, start=2 * number):
            put(folder / "chat" / name, png(shade + 1))
        words = "what colour is the circle ?" + " blue" * (number % 3)
        paths = {"safe_image_path": names[0], "unsafe_image_path": names[1]}
        rows.append({**paths, "unsafe_image": "", "intent": "", "Type": "physical", "queries": [words]})
    mss(folder, rows)
    return folder


def options(source: Path, run: Path, out: Path, *more: object) -> list[str]:
    """The command line behind `psa-fast`."""
    fixed = ("bench", "mssbench", "--source", source, "--run", run, "--out", out, "--max_new_tokens", 3)
    return [*map(str, (*fixed, "--batch_size", 3, *more))]


def begin(out: Path) -> Path:
    """An empty folder of a run that began at DATE: figures apart, two runs differ in their date alone."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "bench.json").write_text(json.dumps({"date": DATE, "steps": {}}))
    return out


def start(command: list[str], ranks: int = 1) -> list:
    """Processes that run it."""
    return tiny.start([sys.executable, str(tiny.ROOT / "psa_fast" / "cli" / "__main__.py"), *command], ranks)


def told(out: Path) -> list[bytes]:
    """The report, to the byte."""
    return [(out / name).read_bytes() for name in ("report.json", "report.md")]
