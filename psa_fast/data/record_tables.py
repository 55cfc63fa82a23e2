"""Tables in the place of JSONL: Parquet and folders of Hugging Face `datasets` that training is pointed at.

They become JSONL and image files once, in the cache, by the importer `records`; training then reads those, a row at a
time and an image when it is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from psa_fast.data.importers.records import read, tables_of
from psa_fast.data.importers.writing import import_rows
from psa_fast.data.records import DataError
from psa_fast.files import named
from psa_fast.made_once import default_cache, once
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

# of a folder with several splits the first of these that is there
TRAINED_ON, EVALUATED_ON = ("train",), ("validation", "dev", "test")
RECORDS, IMAGES = "records.jsonl", "images"


def is_table(path: str | Path) -> bool:
    """Whether a path is a Parquet file or a folder, which no JSONL file is."""
    path = Path(path)
    return path.suffix == ".parquet" or path.is_dir()


def as_records(
    path: str | Path,
    image_folder: str | Path | None,
    splits: tuple[str, ...],
    option: str,
    on_bad_sample: str,
    keep_keys: Sequence[str] = (),
    taxonomy: Taxonomy = PSA,
) -> tuple[str, str]:
    """The JSONL file and the image folder that tables stand for, made on first use. Safe for several ranks at once.

    A table is known by its path, size and time of change.

    Args:
        path: a Parquet file, a folder of them, or a folder of `save_to_disk`.
        image_folder: where the images are that the rows name; None: they stand in the tables, or below their folder.
        splits: of a folder with several, the first of these is read.
        option: that named the path, for messages.
        on_bad_sample: "error", or "skip" to leave out rows that cannot be used.
        keep_keys: keys that look like ours and are to be left unread.
        taxonomy: what the labels are of.

    Raises:
        ValueError: there is no table or no such split, or (`DataError`) rows cannot be used.
    """
    source = Path(path)
    found = tables_of(source, None, option)
    names = list(dict.fromkeys(name for _, name in found))
    split = None
    if len(names) > 1:
        split = next((name for name in splits if name in names), None)
        if split is None:
            has = ", ".join(str(name) for name in names)
            raise ValueError(f"{option} {source} has the splits {has}; expected {' or '.join(splits)}, or name a file")
    files = [file for file, name in found if name == split or split is None]
    with named(source):
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    choices = [facts, str(image_folder), on_bad_sample, sorted(keep_keys), taxonomy.to_json()]
    key = hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]
    cache = default_cache()
    with named(cache):
        cache.mkdir(parents=True, exist_ok=True)

    def make(folder: Path) -> None:
        folder.mkdir()
        images = folder / IMAGES if image_folder is None else None
        args = argparse.Namespace(source=str(source), split=split, images=images, image_folder=image_folder)
        rows = read(args)
        partly = on_bad_sample == "skip"
        result = import_rows(rows, folder / RECORDS, args.image_folder, partly, keep_keys, taxonomy)
        if not result.written:
            raise DataError(source, result.problems) if result.problems else ValueError(f"{option} {source}: no rows")
        for reason, count in result.reasons.items():
            print(f"{option} {source}: left out {count} row(s): {reason}", flush=True)

    folder = once(cache / f"records-{key}", make)
    return str(folder / RECORDS), str(image_folder or folder / IMAGES)
