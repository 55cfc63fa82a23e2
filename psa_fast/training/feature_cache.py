"""Vision features on disk: bf16, memory-mapped, found by the image's bytes, the tower and its processor.

FOLDER/<digest of fingerprint and shape>/
    fingerprint.json     what the digest stands for
    rank-00000.bin       entries of [S, Dv] bf16, one after another, written by rank 0 alone
    rank-00000.jsonl     {"image": sha256, "row": n}, one line an entry, written after the entry's bytes are on the disk

An entry exists once its line ends in a newline. A process killed at any moment leaves at most bytes without a line,
which the rank's next writer cuts off. Another tower, processor or shape is another digest and so another folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VERSION = 1


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

    Raises ValueError for a damaged index.
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
        content = json.dumps(
            {"version": VERSION, "shape": self.shape, "dtype": "bfloat16", "fingerprint": fingerprint}, sort_keys=True
        )
        self.folder = Path(folder) / hashlib.sha256(content.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_once(self.folder / "fingerprint.json", content + "\n")
        self._places: dict[str, tuple[int, int]] = {}  # image -> (rank, row)
        self._read: dict[int, int] = {}  # rank -> bytes of its index that have been read
        self._maps: dict[int, np.memmap] = {}
        self._pending: list[str] = []
        self._data: int | None = None
        self._index: int | None = None
        self._rows = 0  # of this rank's file, pending ones included
        self._scan()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image_hash: str) -> bool:
        if image_hash not in self._places:
            self._scan()
        return image_hash in self._places

    def get(self, image_hash: str) -> Tensor | None:
        """bf16 [S, Dv] in the mapped file's own memory (writing to it changes nothing on the disk), or None."""
        if image_hash not in self:
            return None
        rank, row = self._places[image_hash]
        mapped = self._maps.get(rank)
        if mapped is None or row >= mapped.shape[0]:
            path = self._path(rank, "bin")
            rows = path.stat().st_size // self.entry_bytes
            # copy-on-write: torch wants writable memory, the file must never change
            mapped = np.memmap(path, dtype=np.int16, mode="c", shape=(rows, *self.shape))
            self._maps[rank] = mapped
        return torch.from_numpy(mapped[row]).view(torch.bfloat16)

    def put(self, image_hash: str, features: Tensor) -> None:
        """Append an entry, unless the image has one. `features` [S, Dv] of any float dtype and device.

        Raises:
            ValueError: another shape, values that are not finite, or another process that writes as this rank.
        """
        if image_hash in self._places:
            return
        if tuple(features.shape) != self.shape:
            raise ValueError(f"features are {list(features.shape)}, the cache holds {list(self.shape)}")
        entry = features.detach().to("cpu", torch.bfloat16).contiguous()
        if not torch.isfinite(entry).all():
            raise ValueError(f"the features of image {image_hash} are not finite")
        data = self._open() if self._data is None else self._data
        _write_all(data, entry.view(torch.int16).numpy().tobytes(), self._rows * self.entry_bytes)
        self._places[image_hash] = (self.rank, self._rows)
        self._rows += 1
        self._pending.append(image_hash)
        if len(self._pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Make what was put survive: bytes first, then the lines that make them count."""
        if not self._pending:
            return
        assert self._data is not None
        assert self._index is not None
        os.fsync(self._data)
        first = self._rows - len(self._pending)
        lines = "".join(json.dumps({"image": h, "row": first + i}) + "\n" for i, h in enumerate(self._pending))
        _write_all(self._index, lines.encode(), self._read.get(self.rank, 0))
        os.fsync(self._index)
        self._read[self.rank] = self._read.get(self.rank, 0) + len(lines.encode())
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

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _path(self, rank: int, kind: str) -> Path:
        return self.folder / f"rank-{rank:05d}.{kind}"

    def _scan(self) -> None:
        """Read what has been added to any rank's index, complete lines only."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            rank = int(path.stem.split("-")[1])
            if rank == self.rank and self._data is not None:
                continue  # nobody else writes there
            known = self._read.get(rank, 0)
            if path.stat().st_size <= known:
                continue
            with path.open("rb") as file:
                file.seek(known)
                added = file.read()
            added = added[: added.rfind(b"\n") + 1]
            rows = self._path(rank, "bin").stat().st_size // self.entry_bytes
            for line in added.splitlines():
                try:
                    entry = json.loads(line)
                    image, row = str(entry["image"]), int(entry["row"])
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path} is damaged ({line[:80]!r}); delete {self.folder} to build anew") from None
                if row >= rows:
                    raise ValueError(f"{path} names row {row}, its data has {rows}; delete {self.folder} to build anew")
                self._places.setdefault(image, (rank, row))
                if rank == self.rank:
                    self._rows = row + 1
            self._read[rank] = known + len(added)

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


def _write_once(path: Path, text: str) -> None:
    """Write a file that all ranks agree on; a half-written one is never seen."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """pwrite, which may write less than asked, until all is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
