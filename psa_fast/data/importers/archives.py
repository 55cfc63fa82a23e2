"""Containers that public datasets come in: zip and tar archives, Parquet tables. Nothing is ever unpacked by name."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from psa_fast.data.importers import BadRow
from psa_fast.data.stand_ins import placeholder
from psa_fast.files import shorten

LARGEST_MEMBER = 2**28  # bytes of one image, unpacked
BATCH = 64  # rows of a Parquet table that are held at a time


class Member(NamedTuple):
    """A file in an archive."""

    archive: Path
    name: str
    info: Any


def refuse_placeholder(path: Path) -> None:
    """Raise ValueError for what was left in the place of a file that was not really downloaded."""
    with path.open("rb") as file:
        if stands := placeholder(file.read(64)):
            raise ValueError(f"{path}:1: the file is {stands}")


class Archives:
    """The .zip and .tar files of a folder, indexed by the names of their members when one is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, list[Member]] | None = None
        self._open: dict[Path, Any] = {}
        self.packed: list[Path] = []  # tars within a compression, which has no random access

    def find(self, name: str, within: str = "") -> Member | None:
        """Return the member whose path ends with `name`, None if there is none.

        Args:
            name: a relative path, or its end.
            within: the folder, below this one, whose archives are looked through.

        Raises:
            BadRow: several members fit.
            ValueError: an archive cannot be read, or a member's path leaves it.
        """
        wanted = PurePosixPath(name).parts
        index = self._members()
        fits = [
            member
            for member in index.get(wanted[-1] if wanted else "", [])
            if PurePosixPath(member.name).parts[-len(wanted) :] == wanted
            and member.archive.is_relative_to(self.folder / within)
        ]
        exact = [member for member in fits if PurePosixPath(member.name).parts == wanted]
        fits = exact or fits
        if len(fits) > 1:
            shown = ", ".join(f"{member.archive.name}:{member.name}" for member in fits[:3])
            raise BadRow(f"image {shorten(name)} is in the archives {len(fits)} times: {shown}", "ambiguous image")
        return fits[0] if fits else None

    def read(self, member: Member) -> bytes:
        """Return a member's bytes. Raises BadRow if it is too large, encrypted or damaged."""
        archive = self._open[member.archive]
        try:
            if isinstance(archive, zipfile.ZipFile):
                size, file = member.info.file_size, archive.open(member.info)
            else:
                size, file = member.info.size, archive.extractfile(member.info)
            with file:
                data = file.read(LARGEST_MEMBER + 1)
        except Exception as error:  # zlib, struct, RuntimeError for a password, NotImplementedError for a method, ...
            raise BadRow(f"{member.archive}: member {shorten(member.name)} cannot be read: {error}") from error
        if max(size, len(data)) > LARGEST_MEMBER:
            raise BadRow(f"{member.archive}: member {shorten(member.name)} has more than {LARGEST_MEMBER} bytes")
        return data

    def close(self) -> None:
        """Close what was opened."""
        for archive in self._open.values():
            archive.close()
        self._open.clear()

    def _members(self) -> dict[str, list[Member]]:
        if self._index is None:
            self._index = {}
            for path in _files(self.folder):
                if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
                    self.packed.append(path)
                elif path.suffix.lower() in (".zip", ".tar"):
                    for number, (name, info) in enumerate(self._contents(path), start=1):
                        parts = PurePosixPath(name).parts
                        if not parts or parts[0] == "/" or ":" in parts[0] or ".." in parts or "\\" in name:
                            raise ValueError(
                                f"{path}:{number}: member {shorten(name)} leaves the archive, which is refused"
                            )
                        self._index.setdefault(parts[-1], []).append(Member(path, name, info))
        return self._index

    def _contents(self, path: Path) -> list[tuple[str, Any]]:
        refuse_placeholder(path)
        try:
            if path.suffix.lower() == ".zip":
                self._open[path] = archive = zipfile.ZipFile(path)
                return [(info.filename, info) for info in archive.infolist() if not info.is_dir()]
            self._open[path] = packed = tarfile.open(path, "r:")  # noqa: SIM115
            return [(info.name, info) for info in packed.getmembers() if info.isreg()]
        except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path}:1: the archive cannot be read, is the download complete? ({error})") from None


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, in order, without those of hidden folders (.git, .cache)."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names))


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the cells of each row of a Parquet table, BATCH rows at a time.

    Args:
        path: the file.
        columns: names that must be there.

    Raises:
        ValueError: naming the file, for one that is no table, is damaged, or lacks a column; pyarrow is missing.
    """

    def batches() -> Iterator[Any]:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as table:
            yield table.schema_arrow.names
            yield from table.iter_batches(batch_size=BATCH)

    return _table_rows(path, columns, batches)


def read_arrow(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of an Arrow stream, the file of Hugging Face `datasets`, as `read_parquet` does."""

    def batches() -> Iterator[Any]:
        import pyarrow

        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            yield stream.schema.names
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH)

    return _table_rows(path, columns, batches)


def _table_rows(
    path: Path, columns: Sequence[str], batches: Callable[[], Iterator[Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table; `batches` yields the names of its columns, then batches of rows."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: reading tables needs pyarrow: pip install 'psa-fast[data]'") from None
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    refuse_placeholder(path)
    number = 0
    try:
        found = batches()
        names = next(found)
        if missing := [name for name in columns if name not in names]:
            raise BadRow(f"no column {', '.join(missing)}; the table has {', '.join(names)}"[:500])
        for batch in found:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, BadRow) as error:
        reason = error if isinstance(error, BadRow) else f"the table cannot be read: {error}"
        raise ValueError(f"{path}:{number + 1}: {reason}") from None
