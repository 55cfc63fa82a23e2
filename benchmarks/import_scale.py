"""A dataset of 100,000 rows imported, checked, read for training and searched for overlaps: seconds and peak memory.

python benchmarks/import_scale.py [--rows 100000] [--json FILE]

The source is made up in SPA-VL's layout: Parquet with the images inside, 128 x 128 JPEGs, each distinct one in four
rows, and questions of 12 words; one row in twenty is in the split validation. Each step is a process of its own, and
its peak memory that of the process (ru_maxrss). Needs pyarrow, and 8 kB of disk a row.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random

PER_FILE, ROWS_OF_AN_IMAGE, VALIDATION = 12_500, 4, 20
CLASSES = (("Privacy", "personal"), ("Unfair", "racial"), ("Toxic", "insult"), ("False information", "rumors"))
READ = "from psa_fast.data.records import fingerprint, load_records as load; fingerprint(load(*{!r}, decode=False))"


def jpeg(seed: int) -> bytes:
    """A picture of soft colours."""
    import numpy as np
    from PIL import Image

    colours = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((128, 128)).save(file, "JPEG", quality=85)
    return file.getvalue()


def make_source(folder: Path, rows: int) -> None:
    """Write the Parquet files."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    random = Random(0)
    words = [f"word{number}" for number in range(5000)]
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    for split, count in (("validation", rows // VALIDATION), ("train", rows - rows // VALIDATION)):
        (folder / split).mkdir(parents=True)
        for start in range(0, count, PER_FILE):
            numbers = range(start, min(start + PER_FILE, count))
            first = 0 if split == "train" else rows  # no image of one split is in the other
            pictures = {n: jpeg(first + n) for n in {number // ROWS_OF_AN_IMAGE for number in numbers}}
            classes = [CLASSES[number % len(CLASSES)] for number in numbers]
            table = {
                "image": arrow.array(
                    [{"bytes": pictures[n // ROWS_OF_AN_IMAGE], "path": None} for n in numbers], image
                ),
                "question": ["<image>\n" + " ".join(random.choices(words, k=12)) for _ in numbers],
                "chosen": [" ".join(random.choices(words, k=60)) for _ in numbers],
                "rejected": [" ".join(random.choices(words, k=60)) for _ in numbers],
                "class1": ["made up"] * len(numbers),
                "class2": [name for name, _ in classes],
                "class3": [name for _, name in classes],
            }
            parquet.write_table(arrow.table(table), folder / split / f"{split}-{start:06}.parquet", row_group_size=1000)


def measure(*arguments: str) -> dict[str, float]:
    """Seconds, seconds of CPU and peak memory of a Python process that must end well.

    A process begins with its parent's peak, so this one stays small: the source is made by another one.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(arguments)[:300]}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Make the source, run the steps, print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--make", type=Path, help="write the source to this folder, and nothing else")
    args = parser.parse_args(argv)
    if args.make is not None:
        make_source(args.make, args.rows)
        return 0
    with tempfile.TemporaryDirectory() as name:
        source, images, out = Path(name, "source"), Path(name, "images"), Path(name, "out.jsonl")
        measure(__file__, "--make", str(source), "--rows", str(args.rows))
        cli = ("-m", "psa_fast.cli", "data")
        where = "--source", str(source), "--images", str(images), "--out", str(out)
        steps = {
            "import": measure(*cli, "import", "spa_vl", *where),
            "check": measure(*cli, "check", str(out), "--image_folder", str(images)),
            "read": measure("-c", READ.format((str(out), str(images)))),
            "overlap": measure(*cli, "overlap", str(out), "--image_folder", str(images), "--strict"),
        }
        written = sum(1 for _ in out.open())
        files = sum(1 for path in images.rglob("*") if path.is_file())
    figures = {
        "rows": written,
        "images": files,
        "python": platform.python_version(),
        "pyarrow": version("pyarrow"),
        "pillow": version("pillow"),
        "cpus": len(os.sched_getaffinity(0)),
        "steps": steps,
    }
    print(f"{written} records, {files} distinct images")
    for step, found in steps.items():
        print(f"{step:8} {found['seconds']:8.1f} s {found['cpu_seconds']:8.1f} s of CPU {found['peak_mb']:8.0f} MB")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if written == args.rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
