"""A public dataset's folder as an importer reads it: its files, its images, its table of categories."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from psa_fast.data.importers import BadRow, SourceRow, load_importer
from psa_fast.data.importers.archives import read_parquet, refuse_placeholder
from psa_fast.data.importers.pictures import Pictures
from psa_fast.data.importers.tables import read_table
from psa_fast.data.importers.taxonomy_map import Label, TaxonomyMap, read_taxonomy_map
from psa_fast.data.keys import TEMPLATE
from psa_fast.data.records import IMAGE_MARK
from psa_fast.data.rows import read_entries, read_rows
from psa_fast.files import shorten

# where a source has questions alone; such records say so, see TEMPLATE
REFUSAL = "I'm sorry, but I can't help with this request."
COMPLIANCE = "Yes, I can help with this request."


class Entry(NamedTuple):
    """A raw row of the source: where it stands, its split, and its value or the reason why it has none."""

    path: str
    line: int
    split: str
    value: dict[str, Any]
    error: str | None = None


class Source:
    """An open dataset.

    Args:
        name: the importer's name.
        folder: the dataset's folder.
        split: the only split to read; None reads those that are there.
        images: as `out` of Pictures.
        taxonomy_map: a table in the place of the importer's own.

    Raises:
        ValueError: the folder, the split or the table is none.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        split: str | None = None,
        images: str | Path | None = None,
        taxonomy_map: str | Path | None = None,
    ) -> None:
        self.name, self.folder = name, Path(folder)
        self.importer = load_importer(name)
        if not self.folder.is_dir():
            raise ValueError(f"--source {str(folder)!r} does not exist or is not a folder")
        self.published: Mapping[str, int | None] = self.importer.SPLITS
        if split is not None and self.published and split not in self.published:
            raise ValueError(f"--split is {split!r}; {name} has: {', '.join(self.published)}")
        self.split = split
        own = Path(__file__).with_name(f"{name}.yaml")
        self._map = read_taxonomy_map(taxonomy_map or own) if own.is_file() else None
        if taxonomy_map is not None and self._map is None:
            raise ValueError(f"--taxonomy_map: {name} has no labels, so there is nothing to map")
        self.pictures = Pictures(self.folder, None if images is None else Path(images))
        self.entries: Counter[str] = Counter()  # split -> raw rows met

    @property
    def map(self) -> TaxonomyMap:
        """The table of the source's categories."""
        assert self._map is not None, self.name
        return self._map

    def rows(self) -> Iterator[SourceRow]:
        """Yield what the importer makes of each raw row, in order."""
        for entry in self.importer.entries(self):
            self.entries[entry.split] += 1
            if entry.error is not None:
                yield SourceRow(entry.path, entry.line, error=entry.error)
                continue
            try:
                for row in self.importer.records(self, entry):
                    yield SourceRow(entry.path, entry.line, row)
            except BadRow as reason:
                yield SourceRow(entry.path, entry.line, error=str(reason), kind=reason.kind)
        self.pictures.archives.close()

    def wants(self, split: str) -> bool:
        """Whether rows of this split are to be read."""
        return self.split in (None, split)

    def file(self, *names: str) -> Path | None:
        """Return the first of these files of the folder that is there, None if none is."""
        for name in names:
            if (path := self.folder / name).is_file():
                return path
        return None

    def needed(self, *names: str) -> Path:
        """Return the first of these files that is there. Raises ValueError if none is."""
        path = self.file(*names)
        if path is None:
            raise ValueError(f"{self.folder} has none of: {', '.join(names)}; is this {self.importer.HELP}?")
        refuse_placeholder(path)
        return path

    def by_split(self, files: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Path]]:
        """Yield each split that is asked for and its file, the first that is there of its possible names.

        Raises:
            ValueError: there is no file at all, or not that of the split that --split names.
        """
        found = {split: self.file(*names) for split, names in files.items() if self.wants(split)}
        if not any(found.values()):
            names = [name for split in found for name in files[split]]
            raise ValueError(f"{self.folder} has none of: {', '.join(names)}; is this {self.importer.HELP}?")
        for split, path in found.items():
            if path is not None:
                refuse_placeholder(path)
                yield split, path

    def json_rows(self, path: Path, split: str) -> Iterator[Entry]:
        """Yield the rows of a JSON list or JSONL."""
        for line, value, error in read_rows(path):
            if error is None and not isinstance(value, dict):
                error = f"the row is {shorten(value)}; expected an object"
            yield Entry(str(path), line, split, {} if error else value, error)

    def json_entries(self, path: Path, split: str, key: str) -> Iterator[Entry]:
        """Yield the values of a JSON object, each with its own key under `key`."""
        for name, (line, value, error) in read_entries(path, self.importer.HELP):
            if error is None and not isinstance(value, dict):
                error = f"the entry {shorten(name)} is {shorten(value)}; expected an object"
            yield Entry(str(path), line, split, {} if error else {**value, key: name}, error)

    def table_rows(self, path: Path, split: str, columns: Sequence[str]) -> Iterator[Entry]:
        """Yield the rows of a CSV table that must have these columns."""
        for line, row in read_table(path, columns, f"{self.name} CSV"):
            error = "the row has more cells than the table has columns" if None in row else None
            yield Entry(str(path), line, split, {str(key): cell for key, cell in row.items()}, error)

    def parquet_rows(self, columns: Sequence[str], files: Mapping[str, str]) -> Iterator[Entry]:
        """Yield the rows of the Parquet files below the folder; `files` maps the beginning of their names, or the name
        of the folder they stand in, to their split."""
        found = 0
        for path in sorted(self.folder.rglob("*.parquet")):
            start = re.split(r"[-.]", path.name)[0]
            split = files.get(start) or files.get(path.parent.name)
            if split is None or not self.wants(split):
                continue
            found += 1
            for number, row in read_parquet(path, columns):
                yield Entry(str(path), number, split, row)
        if not found:
            raise ValueError(f"{self.folder} has no Parquet file of: {', '.join(files)}; is this {self.importer.HELP}?")

    def record(
        self,
        entry: Entry,
        key: Any,
        question: str,
        label: Label,
        source_label: Any,
        image: str | None = None,
        answer: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Return a row of ours.

        Args:
            entry: the raw row.
            key: what tells it from the others; the id is made of the importer's name and this.
            question: the words, whose own image marks are taken out; may be empty beside an image.
            label: type and level.
            source_label: the source's own label, word for word.
            image: its path, from `pictures`.
            answer: None where the source has none: a sentence of ours then stands there, and the row says so.
            fields: further fields; those that are None are left out.
        """
        words = question.replace(IMAGE_MARK, "").strip()
        marked = f"{IMAGE_MARK}\n{words}".strip() if image is not None else words
        if answer is None:
            answer = REFUSAL if label.risky else COMPLIANCE
            fields[TEMPLATE] = "template"
        row = {
            "id": f"{self.name}-{key}",
            "image": image,
            "safe_type": label.safe_type,
            "safe_level": label.safe_level,
            "source": self.name,
            "source_label": source_label,
            "split": entry.split,
            "licence": self.importer.LICENCE,
            **fields,
            "conversations": [{"from": "user", "value": marked}, {"from": "assistant", "value": answer}],
        }
        return {name: value for name, value in row.items() if value is not None}


def text_of(value: Mapping[str, Any], key: str) -> str:
    """Return a text that the source must have. Raises BadRow for anything else."""
    found = value.get(key)
    if not isinstance(found, str) or not found.strip():
        raise BadRow(f"{key} is {shorten(found)}; expected text")
    return found


def one_of(value: Mapping[str, Any], key: str, choices: Sequence[Any]) -> Any:
    """Return a value that must be one of the choices, of the same kind too. Raises BadRow for anything else."""
    found = value.get(key)
    for choice in choices:
        if type(found) is type(choice) and found == choice:
            return found
    raise BadRow(f"{key} is {shorten(found)}; expected one of: {', '.join(map(str, choices))}", f"unknown {key}")
