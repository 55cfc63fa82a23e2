"""Strict reading of safetensors files: shapes before memory, floating numbers only, all of them finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psa_fast.files import RepeatedKey, shorten, unique_keys, write_with

Shapes = dict[str, tuple[int, ...]]

# other types would be cast without a word: integers and booleans to nonsense, complex numbers to their real part
_FLOATS = ("F16", "BF16", "F32", "F64")


def read_shapes(file: str | Path) -> Shapes:
    """Return names and shapes of a safetensors file from its header; no tensor is read.

    Raises:
        ValueError: naming the file, if it is none or holds numbers that are not floating.
    """
    shapes = {}
    with _opened(file) as tensors:
        _refuse_repeated(file)
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            part = tensors.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise ValueError(f"{file}: {shorten(name)} holds {part.get_dtype()}; expected {', '.join(_FLOATS)}")
            shapes[name] = tuple(part.get_shape())
    return shapes


def check_header(file: str | Path) -> None:
    """Raise ValueError, naming the file, for one whose header and size are not those of a safetensors file."""
    with _opened(file):
        return


def require_shapes(file: str | Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file whose names, shapes or types are not those that are expected.

    Raises:
        ValueError: naming the file and what is missing, unexpected or of another shape.
    """
    found = read_shapes(file)
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{file} does not fit: missing keys {_some(missing)}, unexpected {_some(unexpected)}")
    for name, shape in expected.items():
        if found[name] != tuple(shape):
            raise ValueError(f"{file}: {name} has shape {found[name]}, the model {tuple(shape)}")


def read_tensors(file: str | Path, checksum: str | None = None, extra: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one, in the order of their names.

    Args:
        file: a safetensors file.
        checksum: what `checksum_of` gave for the same tensors; None: unknown.
        extra: as it was given to `checksum_of`.

    Raises:
        ValueError: naming the file: NaN or infinity, or, after the last tensor, another checksum.
    """
    digest = hashlib.sha256(extra.encode())
    with _opened(file) as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{file}: {name} holds numbers that are not finite")
            if checksum is not None:
                _update(digest, name, tensor)
            yield name, tensor
    if checksum is not None and digest.hexdigest() != checksum:
        raise ValueError(f"{file} holds other numbers than were saved (its checksum in psa_config.json differs)")


def checksum_of(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """Return the SHA-256 over names, types, shapes and bytes of tensors, and over a text that belongs to them."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return digest.hexdigest()


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all; ValueError for a shard of ZeRO-3, OSError if it cannot be."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0 and tensor.shape[:1] != (0,):
            raise ValueError(f"{name} is empty: a ZeRO-3 shard must be gathered before it is saved")
    # clones: safetensors refuses tensors that share memory
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_with(file, lambda unfinished: save_file(whole, unfinished, metadata={"format": "pt"}))


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def _refuse_repeated(file: str | Path) -> None:
    """Raise ValueError for a header that names a tensor twice, of which safetensors takes the last."""
    with Path(file).open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=unique_keys)
    except RepeatedKey as error:
        raise ValueError(f"{file}: {error}") from None


def _some(names: list[str]) -> str:
    return (shorten(names[0]) + (f" and {len(names) - 1} more" if names[1:] else "")) if names else "none"


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    file = Path(file)
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file}: {'is not a file' if file.exists() else 'no such file'}")
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {shorten(str(error))}") from None
