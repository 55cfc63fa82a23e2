"""The images of a source: where they lie, or written out once under the hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psa_fast.data.images import ImageError, image_format, resolve
from psa_fast.data.importers import BadRow
from psa_fast.data.importers.archives import Archives
from psa_fast.files import shorten, write_with

MISSING = "an image is missing"
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # the others are called as they end
SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")  # where a source names an image without one


class Pictures:
    """Gives each image of a source its path in the records.

    Args:
        folder: the source's folder; image files of it stay where they are if `out` is None.
        out: the folder that images are written to, deduplicated by content; None refuses images within archives
            and tables, which have no file of their own.
    """

    def __init__(self, folder: Path, out: Path | None) -> None:
        self.folder, self.out = folder, out
        self.archives = Archives(folder)
        self.stored: dict[bytes, str] = {}  # SHA-256 -> path
        self.duplicates = 0
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    @property
    def root(self) -> Path:
        """The folder that the records' paths are relative to."""
        return self.folder if self.out is None else self.out

    def find(self, name: Any, roots: Sequence[str] = ("",), within: str = "") -> str:
        """Return the path of an image that the source names.

        Args:
            name: as the source has it.
            roots: folders below the source's that the name may be relative to.
            within: the folder whose archives are looked through.

        Raises:
            BadRow: the image is not there, or its path leaves the folder.
        """
        if not isinstance(name, str) or not name.strip():
            raise BadRow(f"image is {shorten(name)}; expected a path")
        try:
            resolve(self.folder, name)  # refuses what leads out of it, whatever the roots are
            for root in roots:
                path = resolve(self.folder, f"{root}/{name}" if root else name)
                if path.is_file():
                    shown = path.relative_to(self.folder.resolve())
                    return shown.as_posix() if self.out is None else self._store(path.read_bytes(), repr(str(path)))
        except ImageError as error:
            raise BadRow(str(error)) from None
        if member := self.archives.find(name, within):
            return self._store(self.archives.read(member), f"{member.archive}: {shorten(member.name)}")
        packed = f"; unpack {self.archives.packed[0].name} first?" if self.archives.packed else ""
        raise BadRow(f"image {shorten(name)} is neither below {self.folder} nor in an archive there{packed}", MISSING)

    def find_stem(self, stem: str, roots: Sequence[str], within: str) -> str:
        """Return the path of an image that the source names without its ending, as `find`."""
        for suffix in SUFFIXES:
            try:
                return self.find(stem + suffix, roots, within)
            except BadRow as error:
                if error.kind != MISSING:
                    raise
        endings = ", ".join(SUFFIXES)
        raise BadRow(
            f"image {shorten(stem)} ({endings}) is neither below {self.folder} nor in an archive there", MISSING
        )

    def embedded(self, value: Any, roots: Sequence[str] = ("",)) -> str:
        """Return the path of an image that stands in a table: its bytes, or `{"bytes", "path"}`, as `find`."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes) and data:
            return self._store(data, "the table's image")
        name = value.get("path") if isinstance(value, dict) else value
        if name is None:
            raise BadRow("the table's row has no image", MISSING)
        return self.find(name, roots)

    def _store(self, data: bytes, shown: str) -> str:
        if self.out is None:
            raise ValueError(
                f"{shown} is no file of its own; --images DIR says where such images are written (in training, leave "
                "--image_folder out)"
            )
        digest = hashlib.sha256(data)
        if name := self.stored.get(digest.digest()):
            self.duplicates += 1
            return name
        try:
            kind = image_format(data, shown)
        except ImageError as error:
            raise BadRow(str(error)) from None
        text = digest.hexdigest()
        name = f"{text[:2]}/{text[:40]}.{EXTENSIONS.get(kind, kind.lower())}"
        target = self.out / name
        if not target.is_file() or target.stat().st_size != len(data):
            write_with(target, lambda unfinished: unfinished.write_bytes(data))
        self.stored[digest.digest()] = name
        return name
