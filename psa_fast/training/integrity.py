"""Whether a folder of files is what was written: sizes and SHA-256 in `trainer_state.json`, which carries its own.

Nothing is loaded before it has been compared. What an earlier version's checkpoints hold in pickles, which could run
code, is read no further than to the names of what they would call.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_fast.files import read_json, shorten

STATE = "trainer_state.json"
FORMAT = 2  # 1: DeepSpeed's files, without checksums
PICKLES = "deepspeed"  # their folder
ADDON = ("psa_config.json", "psa.safetensors", "adapter", "llm", "tower.safetensors")
_NEEDED = {"step": int, "total_steps": int, "world_size": int, "config": dict}
_BLOCK = 1 << 22
# all that DeepSpeed 0.19 pickled into our checkpoints beside what torch's own safe loader knows
_HARMLESS = {"deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.zero.config.ZeroStageEnum"}


class Damaged(ValueError):
    """A file that is not as it was written; the message names it."""


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a digest of its own content, by which `read_state_file` knows an edited or cut file."""
    content = {name: value for name, value in state.items() if name != "digest"}
    return content | {"digest": _digest(content)}


def write_state_file(path: Path, state: dict[str, Any]) -> None:
    """Write a state, sealed, in format `FORMAT`."""
    path.write_text(_text(seal({"format": FORMAT} | state)), encoding="utf-8")


def _text(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n"


def read_state_file(folder: Path) -> dict[str, Any]:
    """A folder's `trainer_state.json`, if it is as it was written.

    Raises Damaged, naming it, otherwise. Format 1 had no digest: only what every state has is checked there.
    """
    path = folder / STATE
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    try:
        state = read_json(path, "training state")
    except ValueError as error:
        raise Damaged(str(error)) from None
    if "format" not in state:
        if "digest" in state or any(folder.glob("optimizer-*.safetensors")):
            raise Damaged(f"{path} is damaged: it has lost its format")
    elif state.get("digest") != seal(state)["digest"] or path.read_text(encoding="utf-8") != _text(state):
        raise Damaged(f"{path} is damaged or was edited: its content does not match its digest")
    elif state["format"] != FORMAT:
        raise ValueError(f"{path} is of format {shorten(state['format'])}; this version reads {FORMAT}")
    for name, kind in _NEEDED.items():
        if type(state.get(name)) is not kind:
            raise Damaged(f"{path} is damaged: {name} is {shorten(state.get(name))}")
    return state


def describe(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files of a folder, by their path in it."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = sorted(names) if names is not None else [name for name in found if name != STATE]
    # hashing lets go of the interpreter's lock
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _hash(folder / name), names)
        return {name: {"size": size, "sha256": digest} for name, (size, digest) in zip(names, digests, strict=True)}


def verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Compare a folder with what `describe` said of it; a file beside the add-on's that it did not name counts too.

    Raises Damaged, naming the first file that differs.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            raise Damaged(f"{path} is damaged: {path.stat().st_size} bytes long, {expected['size']} were written")
    # whatever lies here would be loaded with the add-on
    for path in sorted(p for name in ADDON for p in (folder / name).rglob("*") if p.is_file()):
        if path.relative_to(folder).as_posix() not in files:
            raise Damaged(f"{path} is none of the files that were written")
    for name, found in describe(folder, files).items():
        if found["sha256"] != files[name]["sha256"]:
            raise Damaged(f"{folder / name} is damaged: its bytes are not those that were written")


def is_of_addon(name: str) -> bool:
    """Whether a file of a checkpoint belongs to its add-on."""
    return name.split("/")[0] in ADDON


def check_pickles(folder: Path) -> None:
    """Look at DeepSpeed's files of a checkpoint of format 1 without unpickling them.

    Raises:
        ValueError: naming a file that would call anything but what such checkpoints need.
        Damaged: naming a file that torch did not write, or not like this.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".py" and p.name != "latest")
    if not files:
        raise Damaged(f"{folder} holds no state")
    for file in files:
        try:
            unknown = sorted(set(get_unsafe_globals_in_checkpoint(str(file))) - _HARMLESS)
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
        except Exception as error:  # readers of hostile archives and pickles raise nearly anything
            raise Damaged(f"{file} is damaged or was not written by torch.save ({shorten(str(error))})") from None
        if unknown:
            raise ValueError(f"{file} would run code ({shorten(', '.join(unknown))}); it is not loaded")
        if bad is not None:
            raise Damaged(f"{file} is damaged: {shorten(bad)} in it does not match its checksum")


@contextmanager
def only_known_pickles() -> Iterator[None]:
    """torch.load, whoever calls it, builds tensors and what `check_pickles` lets through, and calls nothing else."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def sync(folder: Path) -> None:
    """Have the disk take a folder, its files first: a machine that loses power must not keep a name without bytes."""
    below = sorted(folder.rglob("*"), key=lambda path: path.is_dir())
    for path in [*below, folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    """Have the disk take one file, or the names in one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot do it for folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _hash(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
