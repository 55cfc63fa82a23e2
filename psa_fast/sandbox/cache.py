"""Makes the sandbox's world and base once and keeps them: atomic, and safe when several ranks ask at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from psa_fast.files import named
from psa_fast.sandbox.draw import draw_world
from psa_fast.sandbox.language import HintFor, all_texts

logger = logging.getLogger(__name__)

WORLD_SOURCES = ("world.py", "paint.py", "language.py", "around.py", "draw.py", "conversations.py")
BASE_SOURCES = (
    "world.py", "paint.py", "language.py", "around.py", "word_level.py", "lessons.py", "optimise.py",
    "content.py", "vision.py", "base.py",
)  # fmt: skip


def default_cache() -> Path:
    """$PSA_FAST_CACHE, or psa-fast below the user's cache folder. Raises ValueError if the user has none."""
    if own := os.environ.get("PSA_FAST_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "psa-fast"
    try:
        return Path.home() / ".cache" / "psa-fast"
    except RuntimeError as error:
        raise ValueError("there is no home folder for the sandbox's cache; set PSA_FAST_CACHE to a folder") from error


def ensure(cache_dir: str | Path, seed: int, hint_for: HintFor, progress: bool = True) -> tuple[Path, Path]:
    """The folders (world, base) of a seed under `cache_dir`; each is made if it is not there yet.

    A folder's name holds the seed and a digest of the programs and hint texts it is made from, so a change of the
    world, the recipe or the policy never meets an old cache. Of several callers one makes it and the others wait. An
    interrupted run leaves nothing that could be taken for a result.
    """
    # imported here, so that drawing a world does not need torch
    from psa_fast.sandbox.base import train_base

    cache_dir = Path(cache_dir)
    with named(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    world_key = _digest(WORLD_SOURCES)
    base_key = _digest(BASE_SOURCES, *all_texts(hint_for))
    world = _once(cache_dir / f"world-{seed}-{world_key}", lambda out: draw_world(seed, out))
    base = _once(cache_dir / f"base-{seed}-{base_key}", lambda out: train_base(out, seed, hint_for, progress=progress))
    return world, base


def _digest(sources: Sequence[str], *texts: str) -> str:
    """A digest of the programs that make a thing and of what they are given."""
    folder = Path(__file__).parent
    content = [*((folder / name).read_text(encoding="utf-8") for name in sources), *texts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _once(target: Path, make: Callable[[Path], object]) -> Path:
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
