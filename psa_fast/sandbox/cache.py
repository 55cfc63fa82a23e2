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
from psa_fast.sandbox.english_rows import ROWS, draw_english_rows
from psa_fast.sandbox.language import HintFor, all_texts

logger = logging.getLogger(__name__)

WORLD_SOURCES = ("world.py", "paint.py", "language.py", "around.py", "draw.py", "conversations.py")
BASE_SOURCES = (
    "world.py", "paint.py", "language.py", "around.py", "word_level.py", "lessons.py", "optimise.py",
    "content.py", "vision.py", "base.py",
)  # fmt: skip
ENGLISH_SOURCES = (*WORLD_SOURCES, "english.py", "english_rows.py", "sentences.yaml")
SMOLLM2_SOURCES = (*BASE_SOURCES, "smollm2.py")


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
    """The folders (world, base) of the sandbox, as `ensure_world` and `ensure_base` give them."""
    return ensure_world("sandbox", cache_dir, seed), ensure_base("sandbox", cache_dir, seed, hint_for, progress)


def ensure_world(name: str, cache_dir: str | Path, seed: int) -> Path:
    """The folder of a world ("sandbox" or "sandbox-smollm2") under `cache_dir`; it is made if it is not there yet.

    A folder's name holds the seed and a digest of the programs and hint texts it is made from, so a change of the
    world, the recipe or the policy never meets an old cache. Of several callers one makes it and the others wait. An
    interrupted run leaves nothing that could be taken for a result.
    """
    cache_dir = _made(cache_dir)
    if name == "sandbox":
        return _once(cache_dir / f"world-{seed}-{_digest(WORLD_SOURCES)}", lambda out: draw_world(seed, out))
    return _once(
        cache_dir / f"smollm2-world-{seed}-{_digest(ENGLISH_SOURCES)}",
        lambda out: draw_world(seed, out, rows=ROWS, draw=draw_english_rows),
    )


def ensure_base(name: str, cache_dir: str | Path, seed: int, hint_for: HintFor, progress: bool = True) -> Path:
    """The folder of a base, as `ensure_world` gives that of a world.

    Raises ValueError, saying what to install, where the weights of SmolLM2 are not there.
    """
    # imported here, so that drawing a world does not need torch
    from psa_fast.sandbox import smollm2
    from psa_fast.sandbox.base import train_base

    version = None if name == "sandbox" else smollm2.weights_version()  # before minutes of training
    cache_dir = _made(cache_dir)
    texts = tuple(all_texts(hint_for))
    key = _digest(BASE_SOURCES, *texts)
    own = cache_dir / f"base-{seed}-{key}"
    if version is None:
        return _once(own, lambda out: train_base(out, seed, hint_for, progress=progress))

    def make(out: Path) -> None:
        tower = own  # its tower is the one that `keep_tower` would train
        if not own.is_dir():
            kept = cache_dir / f"tower-{seed}-{key}"
            tower = _once(kept, lambda folder: smollm2.keep_tower(folder, seed, hint_for, progress))
        smollm2.build_smollm2_base(out, seed, tower, progress)

    return _once(cache_dir / f"smollm2-base-{seed}-{_digest(SMOLLM2_SOURCES, version, *texts)}", make)


def _made(folder: str | Path) -> Path:
    folder = Path(folder)
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


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
