"""The sandbox's world and base, made once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from psa_fast.files import named
from psa_fast.made_once import once
from psa_fast.sandbox.draw import draw_world
from psa_fast.sandbox.language import HintFor, all_texts

WORLD_SOURCES = ("world.py", "paint.py", "language.py", "around.py", "draw.py", "conversations.py")
BASE_SOURCES = (
    "world.py", "paint.py", "language.py", "around.py", "word_level.py", "lessons.py", "optimise.py",
    "content.py", "vision.py", "base.py",
)  # fmt: skip


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
    world = once(cache_dir / f"world-{seed}-{world_key}", lambda out: draw_world(seed, out))
    base = once(cache_dir / f"base-{seed}-{base_key}", lambda out: train_base(out, seed, hint_for, progress=progress))
    return world, base


def _digest(sources: Sequence[str], *texts: str) -> str:
    """A digest of the programs that make a thing and of what they are given."""
    folder = Path(__file__).parent
    content = [*((folder / name).read_text(encoding="utf-8") for name in sources), *texts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
