"""Vision features on disk: bf16, memory-mapped, found by the image's bytes, the tower and its processor.

FOLDER/<digest of fingerprint and shape>/
    fingerprint.json     what the digest stands for
    rank-00000.bin       entries of [S, Dv] bf16, one after another, written by rank 0 alone
    rank-00000.jsonl     {"image": sha256, "row": n, "crc": ..., "check": ...}, one line an entry, written after the
                         entry's bytes are on the disk; `crc` is CRC-32 of image and bytes, `check` that of the line

An entry exists once its line ends in a newline. A process killed at any moment leaves at most bytes without a line,
which the rank's next writer cuts off. Another tower, processor, shape or format is another digest, another folder.

A line that does not match its `check`, or names bytes that are not there, does not count, and `problems` says so. The
bytes of an entry are compared when they are first used: by `check`, after which a damaged entry does not count either,
or by `get`, which raises. What does not count can be put again; the new entry is used from then on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psa_fast.files import named, parse_json

VERSION = 2  # 1: without checksums


def hash_image(data: bytes) -> str:
    """The key of an image: SHA-256 of its file's bytes."""
    return hashlib.sha256(data).hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order given; for a tower's `state_dict().items()`."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if not tensor.numel():
            raise ValueError(f"{name} is empty: a ZeRO-3 shard must be gathered before it is hashed")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """Features of one tower and processor.

    Every process reads all ranks' files and writes only its own rank's. What another rank has flushed is seen here at
    the next miss. Entries count for other processes, and for a restart, once they are flushed.

    Args:
        folder: of the caches of all fingerprints; made if absent.
        fingerprint: JSON values that name the tower and the processor; any difference makes it another cache.
        shape: of an entry, (S, Dv).
        rank: names the file that `put` appends to.
        flush_every: entries after which `put` flushes by itself.

    Attributes:
        problems: what was found damaged or left unused, a sentence each; for the caller to show.
    """

    def __init__(
        self, folder: str | Path, fingerprint: dict[str, Any], shape: tuple[int, int], rank: int, flush_every: int = 64
    ):
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape is {shape}; expected (tokens, width)")
        if rank < 0 or flush_every < 1:
            raise ValueError("rank must be at least 0 and flush_every at least 1")
        self.shape, self.rank, self.flush_every = (int(shape[0]), int(shape[1])), rank, flush_every
        self.entry_bytes = 2 * self.shape[0] * self.shape[1]
        what = {"shape": self.shape, "dtype": "bfloat16", "fingerprint": fingerprint}
        content, old = (json.dumps({"version": v, **what}, sort_keys=True) for v in (VERSION, VERSION - 1))
        self.folder, unused = (Path(folder) / hashlib.sha256(c.encode()).hexdigest()[:32] for c in (content, old))
        self.problems: list[str] = []
        if unused.is_dir():
            self.problems.append(f"{unused} is of a version without checksums and not used; it may be deleted")
        with named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_once(self.folder / "fingerprint.json", content + "\n")
        # image -> (rank, row, crc), the newest last: more than one where a damaged entry was put again
        self._places: dict[str, list[tuple[int, int, int]]] = {}
        self._whole: set[str] = set()  # whose bytes have been compared; or put, by this process
        self._read: dict[int, int] = {}  # rank -> bytes of its index that have been read
        self._maps: dict[int, np.memmap] = {}
        self._pending: list[tuple[str, int]] = []  # image, crc
        self._data: int | None = None
        self._index: int | None = None
        self._rows = 0  # of this rank's file, pending ones included
        self._scan()
        self._say_what_has_no_line()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image_hash: str) -> bool:
        if image_hash not in self._places:
            self._scan()
        return image_hash in self._places

    def get(self, image_hash: str) -> Tensor | None:
        """bf16 [S, Dv] in the mapped file's own memory (writing to it changes nothing on the disk), or None.

        Raises ValueError, naming the file, for an entry that is not as it was put; from then on it does not count.
        """
        if image_hash not in self:
            return None
        if not self._compare(image_hash):
            raise ValueError(f"--feature_cache: {self.problems[-1]}; it is computed anew when the run is started again")
        rank, row, _ = self._places[image_hash][-1]
        return torch.from_numpy(self._entry(rank, row)).view(torch.bfloat16)

    def check(self, images: Iterable[str]) -> list[str]:
        """Compare entries with what was put, in the files' order; returns the damaged ones, which count no more."""
        known = sorted((image for image in images if image in self._places), key=lambda i: self._places[i][-1][:2])
        return [image for image in known if not self._compare(image)]

    def drop(self, images: Iterable[str]) -> None:
        """Forget entries that `check` found damaged in another process."""
        for image in images:
            self._places.pop(image, None)
            self._whole.discard(image)

    def _compare(self, image: str) -> bool:
        """Whether one of the image's entries is as it was put, which is then the only one; otherwise none counts."""
        if image in self._whole:
            return True
        places = self._places[image]
        while places:
            rank, row, crc = places[-1]
            entry = self._entry(rank, row)
            if entry is not None and _crc(image, entry) == crc:
                self._whole.add(image)
                return True
            places.pop()
        del self._places[image]
        self.problems.append(f"{self._path(rank, 'bin')}: entry {row}, image {image[:12]}..., is damaged")
        return False

    def _entry(self, rank: int, row: int) -> np.ndarray | None:
        """The entry's mapped bytes as int16 [S, Dv]; None if the file ends before it."""
        mapped = self._maps.get(rank)
        if mapped is None or row >= mapped.shape[0]:
            path = self._path(rank, "bin")
            rows = self._rows_on_disk(rank)
            if row >= rows:
                return None
            # copy-on-write: torch wants writable memory, the file must never change
            mapped = np.memmap(path, dtype=np.int16, mode="c", shape=(rows, *self.shape))
            self._maps[rank] = mapped
        return mapped[row]

    def _rows_on_disk(self, rank: int) -> int:
        path = self._path(rank, "bin")
        return path.stat().st_size // self.entry_bytes if path.is_file() else 0

    def put(self, image_hash: str, features: Tensor) -> None:
        """Append an entry, unless the image has one. `features` [S, Dv] of any float dtype and device.

        Raises:
            ValueError: another shape, values that are not finite, or another process that writes as this rank.
            OSError: naming the file, if it cannot be written; entries flushed before count all the same.
        """
        if image_hash in self._places:
            return
        if tuple(features.shape) != self.shape:
            raise ValueError(f"features are {list(features.shape)}, the cache holds {list(self.shape)}")
        entry = features.detach().to("cpu", torch.bfloat16).contiguous()
        if not torch.isfinite(entry).all():
            raise ValueError(f"the features of image {image_hash} are not finite")
        values = entry.view(torch.int16).numpy()
        crc = _crc(image_hash, values)
        with named(self._path(self.rank, "bin")):
            data = self._open() if self._data is None else self._data
            _write_all(data, values.tobytes(), self._rows * self.entry_bytes)
        self._places[image_hash] = [(self.rank, self._rows, crc)]
        self._whole.add(image_hash)
        self._rows += 1
        self._pending.append((image_hash, crc))
        if len(self._pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Make what was put survive: bytes first, then the lines that make them count."""
        if not self._pending:
            return
        assert self._data is not None
        assert self._index is not None
        first = self._rows - len(self._pending)
        lines = "".join(_line(image, first + i, crc) for i, (image, crc) in enumerate(self._pending)).encode()
        with named(self._path(self.rank, "jsonl")):
            os.fsync(self._data)
            _write_all(self._index, lines, self._read.get(self.rank, 0))
            os.fsync(self._index)
        self._read[self.rank] = self._read.get(self.rank, 0) + len(lines)
        self._pending = []

    def close(self) -> None:
        """Flush and let another process write as this rank. Tensors that `get` returned stay valid."""
        self.flush()
        for descriptor in (self._data, self._index):
            if descriptor is not None:
                os.close(descriptor)
        self._data = self._index = None

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        if kind is not None and issubclass(kind, OSError):
            self._pending = []  # a disk that took no more would not take their lines: that failure comes first
        self.close()

    def _path(self, rank: int, kind: str) -> Path:
        return self.folder / f"rank-{rank:05d}.{kind}"

    def _scan(self) -> None:
        """Read what has been added to any rank's index, complete lines only."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            match = re.fullmatch(r"rank-(\d{5})\.jsonl", path.name)
            if match is None:
                continue  # none of ours
            rank = int(match.group(1))
            if rank == self.rank and self._data is not None:
                continue  # nobody else writes there
            known = self._read.get(rank, 0)
            if path.stat().st_size <= known:
                continue
            with path.open("rb") as file:
                file.seek(known)
                added = file.read()
            added = added[: added.rfind(b"\n") + 1]
            rows = self._rows_on_disk(rank)
            damaged = absent = 0
            for line in added.split(b"\n")[:-1]:
                entry = _parse(line)
                if entry is None:
                    damaged += 1
                    continue
                image, row, crc = entry
                if row >= rows:
                    absent += 1
                    continue
                self._places.setdefault(image, []).append((rank, row, crc))
                if rank == self.rank:
                    self._rows = max(self._rows, row + 1)
            self._read[rank] = known + len(added)
            if damaged:
                self.problems.append(f"{path} is damaged: {damaged} of its lines are not as they were written")
            if absent:
                state = "damaged" if rows else "missing or cut"
                self.problems.append(f"{self._path(rank, 'bin')} is {state}: it lacks {absent} of its entries")

    def _say_what_has_no_line(self) -> None:
        """Bytes that no line names: of a build that was interrupted or is under way, or of an index that was lost."""
        listed: dict[int, int] = {}
        for rank, row, _ in (place for places in self._places.values() for place in places):
            listed[rank] = max(listed.get(rank, 0), row + 1)
        for path in sorted(self.folder.glob("rank-*.bin")):
            match = re.fullmatch(r"rank-(\d{5})\.bin", path.name)
            unnamed = self._rows_on_disk(int(match.group(1))) - listed.get(int(match.group(1)), 0) if match else 0
            if unnamed > 0:
                self.problems.append(
                    f"{path}: {unnamed} entries at its end have no line in {path.stem}.jsonl: not used"
                )

    def _open(self) -> int:
        """Become this rank's only writer and cut off what an interrupted one left without a line."""
        data = os.open(self._path(self.rank, "bin"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(data)
            raise ValueError(f"another process writes as rank {self.rank} in {self.folder}") from None
        self._scan()
        index = os.open(self._path(self.rank, "jsonl"), os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(index, self._read.get(self.rank, 0))
        os.ftruncate(data, self._rows * self.entry_bytes)
        self._data, self._index = data, index
        return data


def _crc(image: str, entry: np.ndarray) -> int:
    """CRC-32 over the key too, so that bytes of another entry are not taken for it."""
    return zlib.crc32(entry.data.cast("B"), zlib.crc32(image.encode()))


def _check(image: str, row: int, crc: int) -> int:
    return zlib.crc32(f"{image} {row} {crc}".encode())


def _line(image: str, row: int, crc: int) -> str:
    return json.dumps({"image": image, "row": row, "crc": crc, "check": _check(image, row, crc)}) + "\n"


def _parse(line: bytes) -> tuple[str, int, int] | None:
    """Image, row and CRC of an index line; None if it is not as it was written."""
    try:
        entry = parse_json(line.decode())
        image, row, crc = entry["image"], entry["row"], entry["crc"]
        whole = type(row) is int and row >= 0 and len(entry) == 4 and entry["check"] == _check(image, row, crc)
    except (ValueError, KeyError, TypeError):
        return None
    return (image, row, crc) if whole else None


def _write_once(path: Path, text: str) -> None:
    """Write a file that all ranks agree on, anew if it was changed; a half-written one is never seen."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """pwrite, which may write less than asked, until all is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
