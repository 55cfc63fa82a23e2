"""Folders that are made once and kept: whole or not at all, and safe when several ranks or runs ask at once."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from psa_fast.files import named

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """$PSA_FAST_CACHE, or psa-fast below the user's cache folder. Raises ValueError if the user has none."""
    if own := os.environ.get("PSA_FAST_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "psa-fast"
    try:
        return Path.home() / ".cache" / "psa-fast"
    except RuntimeError as error:
        raise ValueError("there is no home folder for what is made once; set PSA_FAST_CACHE to a folder") from error


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """Call `make` on a temporary folder and rename it to `target`, unless `target` is there; one process at a time."""
    if target.is_dir():
        return target
    with _Lock(target.with_name(f".{target.name}.lock"), f"{target.name} is being made by another process"):
        if not target.is_dir():
            temporary = target.with_name(f".{target.name}.part")
            with named(target):
                if temporary.exists():
                    shutil.rmtree(temporary)
            logger.info("making %s (once; kept in %s)", target.name, target.parent)
            with named(target):
                make(temporary)
                os.replace(temporary, target)
    return target


class _Lock:
    """An advisory lock on a file, which the system drops when its holder ends, however it ends."""

    def __init__(self, path: Path, busy: str):
        self.path, self.busy = path, busy

    def __enter__(self) -> None:
        import fcntl

        with named(self.path):
            self.file = self.path.open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{self.busy}: waiting for it", flush=True)
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        self.file.close()
