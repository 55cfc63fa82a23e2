"""Writers of the raw layouts of public datasets: tables, archives, Parquet, and how a record made of them is shown."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 80, 40)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def json_list(name: str) -> Callable:
    return lambda folder, rows: put(folder / name, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def json_lines(name: str) -> Callable:
    return lambda folder, rows: put(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def json_object(name: str, key: str) -> Callable:
    """An object of the rows under their `key`, which may repeat."""

    def write(folder: Path, rows: list[dict[str, Any]]) -> None:
        entries = [f"{json.dumps(row[key])}: {json.dumps({k: v for k, v in row.items() if k != key})}" for row in rows]
        put(folder / name, "{\n" + ",\n".join(entries) + "\n}\n")

    return write


def table(name: str) -> Callable:
    def write(folder: Path, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        put(folder / name, text.getvalue())

    return write


def parquet(name: str) -> Callable:
    def write(folder: Path, rows: list[dict[str, Any]]) -> None:
        import pyarrow as arrow
        import pyarrow.parquet

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        columns = {key: arrow.array([row[key] for row in rows], image if key == "image" else None) for key in rows[0]}
        arrow.parquet.write_table(arrow.table(columns), folder / name)

    return write


def mss(folder: Path, rows: list[dict[str, Any]]) -> None:
    chat = [row for row in rows if "queries" in row]
    rest = [row for row in rows if "queries" not in row]
    put(folder / "combined.json", f'{{"chat": {json.dumps(chat)},\n"embodied": {json.dumps(rest)}}}')


def packed(name: str, members: dict[str, bytes]) -> bytes:
    """A zip or tar archive."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@dataclass
class Raw:
    """A dataset: `rows` as `write` puts them into `file`, `files` beside it, `lines` what `view` shows of its records.

    `category` and `image` are the rows' keys that say so, None where the file's name or another key does.
    """

    file: str
    write: Callable
    rows: list[dict[str, Any]]
    lines: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    category: str | None = "category"
    image: str | None = "image"
    unique: bool = True  # rows have an id of their own
    line: int = 2  # of the first row
    #: of each record: the shade of its image (None without one) and the question
    asked: list[tuple[int | None, str]] = field(default_factory=list)

    def build(self, folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
        for name, content in self.files.items():
            put(folder / name, content)
        self.write(folder, self.rows if rows is None else rows)
        return folder / self.file


def view(row: dict[str, Any]) -> str:
    """What a golden line shows: id | type level | group, image text joint | source's label | split | twin | answers."""
    letters = "".join({"safe": "S", "unsafe": "U", "unknown": "-"}[row[key]] for key in ("image", "text", "joint"))
    answer = "(ours)" if row["ours"] else row["answer"]
    worse = "".join(f" < {text}" for text in row["rejected"])
    label = f"{row['safe_type']} {row['safe_level']}"
    parts = row["id"], label, f"{row['group']} {letters}", row["label"], row["split"], row["twin"], answer + worse
    return " | ".join(map(str, parts))
