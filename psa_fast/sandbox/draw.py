"""Writes a sandbox world to disk: PNG files and JSONL records, the same bytes for the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psa_fast.files import shorten
from psa_fast.sandbox.conversations import KINDS, Picture, Pictures, draw_rows, joint_scene
from psa_fast.sandbox.paint import paint
from psa_fast.sandbox.world import Scene, Split, sample_scene

# Counted up whenever the same seed no longer gives the same files.
WORLD_VERSION = 4

# Pictures per split: of the groups, and those that joint requests are asked about.
IMAGES: dict[str, dict[str, int]] = {
    "train": {"clean": 1400, "benign_twin": 1800, "risk": 2600, "joint": 700},
    "dev": {"clean": 200, "benign_twin": 200, "risk": 300, "joint": 100},
    "test": {"clean": 400, "benign_twin": 300, "risk": 400, "joint": 240},
}
# Rows per file and kind; a picture serves several rows where there are more rows than pictures.
ROWS: dict[str, dict[str, int]] = {
    "stage1": {
        "clean": 650, "benign_twin": 1000, "risk": 1250, "text_risk": 480, "text_twin": 720,
        "joint_risk": 1500, "joint_twin": 2440, "clean_several": 200, "risk_several": 250,
    },
    "stage2": {
        "clean": 1800, "benign_twin": 1700, "risk": 2100, "text_risk": 250, "text_twin": 450,
        "joint_risk": 350, "joint_twin": 1200, "clean_several": 300, "risk_several": 250,
    },
    "dev": {
        "clean": 200, "benign_twin": 200, "risk": 300, "text_risk": 150, "text_twin": 150,
        "joint_risk": 120, "joint_twin": 120, "clean_several": 60, "risk_several": 60,
    },
    "test": {
        "clean": 400, "benign_twin": 300, "risk": 400, "text_risk": 240, "text_twin": 240,
        "joint_risk": 240, "joint_twin": 240, "clean_several": 120, "risk_several": 120,
    },
}  # fmt: skip
_SPLIT_OF_FILE: dict[str, Split] = {"stage1": "train", "stage2": "train", "dev": "dev", "test": "test"}
_FILES = tuple(ROWS)
RowDrawer = Callable[[np.random.Generator, str, Split, str, int, Pictures], Iterator[dict[str, Any]]]


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that not every random generator here takes."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {shorten(seed)}; expected a whole number of at least 0 and less than 2**63")


def draw_world(
    seed: int,
    out: str | Path,
    images: dict[str, dict[str, int]] | None = None,
    rows: dict[str, dict[str, int]] | None = None,
    splits: Collection[str] | None = None,
    draw: RowDrawer = draw_rows,
) -> dict[str, Any]:
    """Draw a world into the folder `out` and return what world.json says about it.

    Files: images/<split>/*.png, stage1.jsonl and stage2.jsonl (training rows), dev.jsonl (for choosing), test.jsonl
    (for reporting), world.json. `images` and `rows` replace the usual numbers (`IMAGES`, `ROWS`); of `splits`, where
    given, alone anything is drawn, and it is the same as in the whole world. `draw` makes the records of one kind, from
    (generator, file, split, kind, number of rows, the split's pictures by group).
    Raises ValueError for a negative seed, or where `out` already holds something.
    """
    out = Path(out)
    check_seed(seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds something; name a new or empty folder")
    images, rows = images or IMAGES, rows or ROWS
    if splits is not None:
        images = {split: counts for split, counts in images.items() if split in splits}
        rows = {name: counts for name, counts in rows.items() if _SPLIT_OF_FILE[name] in splits}
    pictures: dict[str, dict[str, list[Picture]]] = {}
    for split, counts in images.items():
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        pictures[split] = {}
        for g, (group, count) in enumerate(counts.items()):
            rng = np.random.default_rng([seed, list(IMAGES).index(split), g])
            drawn = [_scene(rng, group, split) for _ in range(count)]  # type: ignore[arg-type]
            paths = [f"images/{split}/{group}-{i:05d}.png" for i in range(count)]
            for path, scene in zip(paths, drawn, strict=True):
                Image.fromarray(paint(scene)).save(out / path, compress_level=1)
            pictures[split][group] = list(map(Picture, paths, drawn))
    for name, counts in rows.items():
        lines: list[str] = []
        split = _SPLIT_OF_FILE[name]
        for kind, count in counts.items():
            rng = np.random.default_rng([seed, 100 + _FILES.index(name), KINDS.index(kind)])
            lines += [json.dumps(row) for row in draw(rng, name, split, kind, count, pictures[split])]
        order = np.random.default_rng([seed, 200]).permutation(len(lines))
        (out / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in order), encoding="utf-8")
    summary = {"world_version": WORLD_VERSION, "seed": seed, "images": images, "rows": rows}
    (out / "world.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _scene(rng: np.random.Generator, group: str, split: Split) -> Scene:
    return joint_scene(rng, split) if group == "joint" else sample_scene(rng, group, split)  # type: ignore[arg-type]
