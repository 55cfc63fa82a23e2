"""The sandbox's world and base, made once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from psa_fast.files import named
from psa_fast.made_once import once
from psa_fast.sandbox.draw import draw_world
from psa_fast.sandbox.english_rows import ROWS, draw_english_rows
from psa_fast.sandbox.language import HintFor, all_texts

WORLD_SOURCES = ("world.py", "paint.py", "language.py", "around.py", "draw.py", "conversations.py")
BASE_SOURCES = (
    "world.py", "paint.py", "language.py", "around.py", "word_level.py", "lessons.py", "optimise.py",
    "content.py", "vision.py", "base.py",
)  # fmt: skip
ENGLISH_SOURCES = (*WORLD_SOURCES, "english.py", "english_rows.py", "sentences.yaml")
SMOLLM2_SOURCES = (*BASE_SOURCES, "smollm2.py")


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
        return once(cache_dir / f"world-{seed}-{_digest(WORLD_SOURCES)}", lambda out: draw_world(seed, out))
    return once(
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
        return once(own, lambda out: train_base(out, seed, hint_for, progress=progress))

    def make(out: Path) -> None:
        tower = own  # its tower is the one that `keep_tower` would train
        if not own.is_dir():
            kept = cache_dir / f"tower-{seed}-{key}"
            tower = once(kept, lambda folder: smollm2.keep_tower(folder, seed, hint_for, progress))
        smollm2.build_smollm2_base(out, seed, tower, progress)

    return once(cache_dir / f"smollm2-base-{seed}-{_digest(SMOLLM2_SOURCES, version, *texts)}", make)


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
