"""Writes a sandbox world to disk: PNG files and JSONL records, the same bytes for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psa_fast.files import shorten
from psa_fast.sandbox.language import TEST_KINDS, TEXT_RISK_LEVEL, question, safe_answer, text_request
from psa_fast.sandbox.world import Group, Scene, Split, paint, sample_scene
from psa_fast.taxonomy import CLEAN

# Counted up whenever the same seed no longer gives the same files.
WORLD_VERSION = 2

# Pictures per split and group.
IMAGES: dict[str, dict[Group, int]] = {
    "train": {"clean": 1400, "benign_twin": 1800, "risk": 2600},
    "dev": {"clean": 200, "benign_twin": 200, "risk": 300},
    "test": {"clean": 400, "benign_twin": 400, "risk": 600},
}
# Rows per file and group; a picture serves several rows where there are more rows than pictures.
ROWS: dict[str, dict[str, int]] = {
    "stage1": {"clean": 1400, "benign_twin": 1800, "risk": 2600, "text_risk": 1200, "text_twin": 1000},
    "stage2": {"clean": 1440, "benign_twin": 2400, "risk": 3440, "text_risk": 400, "text_twin": 320},
    "dev": {"clean": 200, "benign_twin": 200, "risk": 300, "text_risk": 150, "text_twin": 150},
    "test": {"clean": 400, "benign_twin": 400, "risk": 600, "text_risk": 240, "text_twin": 240},
}
_SPLIT_OF_FILE: dict[str, Split] = {"stage1": "train", "stage2": "train", "dev": "dev", "test": "test"}
_FILES, _GROUPS = tuple(ROWS), tuple(ROWS["test"])


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that not every random generator here takes."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {shorten(seed)}; expected a whole number of at least 0 and less than 2**63")


def draw_world(
    seed: int,
    out: str | Path,
    images: dict[str, dict[Group, int]] | None = None,
    rows: dict[str, dict[str, int]] | None = None,
) -> dict[str, Any]:
    """Draw a world into the folder `out` and return what world.json says about it.

    Files: images/<split>/*.png, stage1.jsonl and stage2.jsonl (training rows), dev.jsonl (for choosing), test.jsonl
    (for reporting), world.json. `images` and `rows` replace the usual numbers (`IMAGES`, `ROWS`).
    Raises ValueError for a negative seed, or where `out` already holds something.
    """
    out = Path(out)
    check_seed(seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds something; name a new or empty folder")
    images, rows = images or IMAGES, rows or ROWS
    scenes: dict[tuple[str, str], list[Scene]] = {}
    for s, (split, pictures) in enumerate(images.items()):
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        for g, (kind, count) in enumerate(pictures.items()):
            rng = np.random.default_rng([seed, s, g])
            drawn = [sample_scene(rng, kind, split) for _ in range(count)]  # type: ignore[arg-type]
            for i, scene in enumerate(drawn):
                Image.fromarray(paint(scene)).save(out / _image_path(split, kind, i), compress_level=1)
            scenes[split, kind] = drawn
    for name, counts in rows.items():
        lines: list[str] = []
        for group, count in counts.items():
            rng = np.random.default_rng([seed, 100 + _FILES.index(name), _GROUPS.index(group)])
            lines += [json.dumps(row) for row in _rows(rng, name, _SPLIT_OF_FILE[name], group, count, scenes)]
        order = np.random.default_rng([seed, 200]).permutation(len(lines))
        (out / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in order), encoding="utf-8")
    summary = {"world_version": WORLD_VERSION, "seed": seed, "images": images, "rows": rows}
    (out / "world.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _image_path(split: str, group: str, i: int) -> str:
    return f"images/{split}/{group}-{i:05d}.png"


def _rows(
    rng: np.random.Generator,
    name: str,
    split: Split,
    group: str,
    count: int,
    scenes: dict[tuple[str, str], list[Scene]],
) -> Iterator[dict[str, Any]]:
    pictures = group if (split, group) in scenes else "clean"
    pool = scenes[split, pictures]
    for i in range(count):
        index = i % len(pool)
        scene = pool[index]
        safe_type, safe_level = scene.safe_type, scene.safe_level
        if group == "text_risk":
            safe_type, safe_level = i % CLEAN, TEXT_RISK_LEVEL
        if group in ("text_risk", "text_twin"):
            asked, answer = text_request(rng, split, safe_type)
            label = f"text/{group}"
        else:
            # each test kind equally often; look-alikes and risks are also asked about their sign
            kinds = TEST_KINDS if group == "clean" and split != "train" else (*TEST_KINDS, "sign")
            kind = kinds[i % len(kinds)]
            pair = question(scene, kind, rng) or question(scene, "list", rng)
            assert pair is not None
            asked, truth = pair
            answer = safe_answer(safe_type, safe_level, truth)
            label = f"{scene.background}/{scene.sign.glyph}-{scene.sign.marks}" if scene.sign else scene.background
        yield {
            "id": f"{name}-{group}-{i:05d}",
            "image": _image_path(split, pictures, index),
            "safe_type": safe_type,
            "safe_level": safe_level,
            "conversations": [
                {"from": "human", "value": f"<image>\n{asked}"},
                {"from": "gpt", "value": answer},
            ],
            "source": "sandbox",
            "source_label": label,
            "split": split,
            "group": group,
        }
