import json

import pytest
from builders.tiny_llava import build_addon, build_base, picture

from psa_fast.taxonomy import CLEAN


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A run folder with two stages and a data folder with every group."""
    root = tmp_path_factory.mktemp("world")
    base = build_base(root / "base")
    for stage in ("stage1", "stage2"):
        build_addon(base, root / "run" / stage, seed=len(stage))
    rows = []
    for i in range(20):
        group = ("clean", "benign_twin", "risk", "text_risk", "text_twin")[i % 5]
        kind, level = (i % 6, 1 + i % 3) if "risk" in group else (CLEAN, 0)
        (root / "data" / "images").mkdir(parents=True, exist_ok=True)
        picture(i).save(root / "data" / "images" / f"{i}.png")
        turns = [
            {"from": "user", "value": "<image>\nwhat colour is the circle ?"},
            {"from": "assistant", "value": "red"},
        ]
        row = {
            "image": f"images/{i}.png",
            "safe_type": kind,
            "safe_level": level,
            "group": group,
            "conversations": turns,
        }
        rows.append(json.dumps(row))
    (root / "data" / "test.jsonl").write_text("\n".join(rows))
    return root
