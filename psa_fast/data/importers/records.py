"""Our own records in tables: Parquet files, or a folder that Hugging Face `datasets` wrote with `save_to_disk`.

Columns are the fields of a record (docs/data.md); an image is a path, or `{"bytes", "path"}` as an Image column holds
it, or a list of them, in a column `image` or `images`. A cell without a value is a field that is not there. Arrow and
Parquet are read BATCH rows at a time.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psa_fast.data.importers import BadRow, SourceRow
from psa_fast.data.importers.archives import read_arrow, read_parquet
from psa_fast.data.importers.pictures import Pictures
from psa_fast.files import read_json, shorten

HELP = "records of our own in Parquet, or in a folder of Hugging Face datasets (save_to_disk)"
LICENCE = None
NEEDED = ("conversations",)
OWN_RECORDS = True  # their labels may be of any taxonomy; what other importers read is PSA's by their tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the importer's options."""
    parser.add_argument(
        "--source", required=True, metavar="PATH", help="a .parquet, a folder of them, or save_to_disk's"
    )
    parser.add_argument("--split", help="read this one alone, where the folder has several")
    parser.add_argument("--images", metavar="DIR", help="write the tables' images here, each content once")
    parser.add_argument("--image_folder", metavar="DIR", help="where image paths start (default: the source's folder)")


def read(args: argparse.Namespace) -> Iterator[SourceRow]:
    """Return the rows of all tables; `args.image_folder` becomes the folder of the records' images.

    Raises:
        ValueError: there is no table, or not of this split.
    """
    source = Path(args.source)
    tables = tables_of(source, args.split)
    folder = Path(args.image_folder or (source if source.is_dir() else source.parent))
    pictures = Pictures(folder, None if args.images is None else Path(args.images))
    args.image_folder = str(pictures.root)
    return _rows(tables, pictures)


def tables_of(source: Path, split: str | None, option: str = "--source") -> list[tuple[Path, str | None]]:
    """The files to read with their splits (None: the source does not say), in order.

    Raises ValueError if there is none, or none of this split.
    """
    if source.is_file():
        found: list[tuple[Path, str | None]] = [(source, None)]
    elif (source / "dataset_dict.json").is_file():
        names = read_json(source / "dataset_dict.json", "list of splits").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{source / 'dataset_dict.json'}: splits is {shorten(names)}; expected names")
        found = [(file, name) for name in names for file in _arrow_files(source / name)]
    elif (source / "state.json").is_file():
        found = [(file, None) for file in _arrow_files(source)]
    else:
        files = sorted(source.rglob("*.parquet"))
        found = [(file, re.split(r"[-.]", file.name)[0] if "-" in file.name else None) for file in files]
    if split is not None:
        found = [(file, name) for file, name in found if name == split]
    if not found:
        which = f" of the split {split}" if split is not None else ""
        raise ValueError(f"{option} {source}: there is no Parquet file and no folder of save_to_disk{which}")
    return found


def _arrow_files(folder: Path) -> list[Path]:
    """The files of one split, as its `state.json` lists them."""
    state = folder / "state.json"
    listed = read_json(state, "state of the dataset").get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [file["filename"] for file in entries if isinstance(file, dict) and isinstance(file.get("filename"), str)]
    if not names or len(names) < len(entries) or any(Path(name).name != name for name in names):
        raise ValueError(f"{state}: _data_files is {shorten(listed)}; expected the names of files beside it")
    return [folder / name for name in names]


def _rows(tables: list[tuple[Path, str | None]], pictures: Pictures) -> Iterator[SourceRow]:
    for path, split in tables:
        reader = read_parquet if path.suffix == ".parquet" else read_arrow
        for number, cells in reader(path, NEEDED):
            try:
                yield SourceRow(str(path), number, _record(cells, split, pictures))
            except BadRow as error:
                yield SourceRow(str(path), number, error=str(error), kind=error.kind)


def _record(cells: dict[str, Any], split: str | None, pictures: Pictures) -> dict[str, Any]:
    """A row of a table as a row of ours. Raises BadRow for an image or a cell that cannot be one."""
    row = {name: value for name, value in cells.items() if value is not None}
    if split is not None:
        row.setdefault("split", split)
    if "image" not in row and "images" in row:
        row["image"] = row.pop("images")
    if (found := row.pop("image", None)) not in (None, []):
        images = [pictures.embedded(image) for image in (found if isinstance(found, list) else [found])]
        row["image"] = images if isinstance(found, list) else images[0]
    turns = row.get("conversations")
    if isinstance(turns, list):  # a struct has every key in every row
        row["conversations"] = [
            {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else turn
            for turn in turns
        ]
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError:
            kind = f"column {shorten(name)} holds what JSON has no word for"
            raise BadRow(f"{kind} ({type(value).__name__}); leave the column out", kind) from None
    return row
