"""The rows of a world with real sentences: the drawn pictures, asked about in English (english.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from psa_fast.sandbox.conversations import PICTURELESS, Picture, Pictures
from psa_fast.sandbox.english import (
    QUESTION_KINDS,
    aside,
    joint_request,
    picture_question,
    safe_answer,
    text_request,
)
from psa_fast.sandbox.language import TEXT_RISK_LEVEL, joint_type
from psa_fast.sandbox.world import Scene, Split
from psa_fast.taxonomy import CLEAN

# Rows per file and kind, one picture at most in each. The pictures are as many as in the other world (draw.py).
ROWS: dict[str, dict[str, int]] = {
    "stage1": {
        "clean": 700, "benign_twin": 900, "risk": 1100, "text_risk": 2200, "text_twin": 2500,
        "joint_risk": 1400, "joint_twin": 2200,
    },
    "stage2": {
        "clean": 1800, "benign_twin": 1700, "risk": 2100, "text_risk": 700, "text_twin": 1000,
        "joint_risk": 350, "joint_twin": 1200,
    },
    "dev": {
        "clean": 200, "benign_twin": 200, "risk": 300, "text_risk": 240, "text_twin": 240,
        "joint_risk": 120, "joint_twin": 120,
    },
    "test": {
        "clean": 400, "benign_twin": 300, "risk": 400, "text_risk": 480, "text_twin": 480,
        "joint_risk": 240, "joint_twin": 240,
    },
}  # fmt: skip
# Share of the rows with an aside before or behind the request.
ASIDE = 0.2


def draw_english_rows(
    rng: np.random.Generator, name: str, split: Split, kind: str, count: int, pictures: Pictures
) -> Iterator[dict[str, Any]]:
    """`count` records of a kind (a key of ROWS) for the file `name`; `pictures` are the split's, by group."""
    for i in range(count):
        if kind.startswith("text"):
            safe_type = i // PICTURELESS % CLEAN if kind == "text_risk" else CLEAN
            safe_level = 0 if safe_type == CLEAN else TEXT_RISK_LEVEL
            picture = None if i % PICTURELESS == 0 else _cycled(pictures, "clean", i)
            asked, answer = text_request(rng, split, safe_type)
        elif kind == "joint_risk":
            picture = _cycled(pictures, "joint", i)
            safe_type, safe_level = joint_type(picture.scene), TEXT_RISK_LEVEL
            asked, answer = joint_request(rng, split, picture.scene, risky=True)
        elif kind == "joint_twin":
            safe_type, safe_level = CLEAN, 0
            picture, asked, answer = _joint_twin(rng, split, i, pictures)
        else:
            picture = _cycled(pictures, kind, i)
            safe_type, safe_level = picture.scene.safe_type, picture.scene.safe_level
            # each kind of question equally often; look-alikes and risks are also asked about their sign
            kinds = QUESTION_KINDS if kind == "clean" else (*QUESTION_KINDS, "sign")
            asked, truth = _question(rng, split, picture.scene, kinds[i % len(kinds)])
            answer = safe_answer(safe_type, safe_level, truth)
        if rng.random() < ASIDE:
            said = aside(rng, split)
            asked = f"{said} {asked}" if rng.random() < 0.5 else f"{asked} {said}"
        risky_picture = picture is not None and kind in ("risk", "joint_risk")
        yield {
            "id": f"{name}-{kind}-{i:05d}",
            **({} if picture is None else {"image": picture.path}),
            **({"regions": [picture.scene.sign_box]} if picture is not None and risky_picture else {}),
            "safe_type": safe_type,
            "safe_level": safe_level,
            "conversations": [
                {"from": "human", "value": asked if picture is None else f"<image>\n{asked}"},
                {"from": "gpt", "value": answer},
            ],
            "source": "sandbox",
            "split": split,
            "group": kind,
        }


def _joint_twin(rng: np.random.Generator, split: Split, i: int, pictures: Pictures) -> tuple[Picture, str, str]:
    """Of ten: five joint pictures with another pictogram's request, three other pictures with a joint request, two
    joint pictures with a question and with a text twin."""
    place = i % 10
    picture = _cycled(pictures, "clean" if place in (5, 6) else "benign_twin" if place == 7 else "joint", i)
    if place == 8:
        asked, answer = _question(rng, split, picture.scene, (*QUESTION_KINDS, "sign")[i // 10 % 5])
    elif place == 9:
        asked, answer = text_request(rng, split, CLEAN)
    else:
        asked, answer = joint_request(rng, split, picture.scene, risky=False)
    return picture, asked, answer


def _question(rng: np.random.Generator, split: Split, scene: Scene, kind: str) -> tuple[str, str]:
    """A question of a kind, or for a colour where the scene offers none of that kind."""
    pair = picture_question(rng, split, scene, kind) or picture_question(rng, split, scene, "colour")
    assert pair is not None
    return pair


def _cycled(pictures: Pictures, group: str, i: int) -> Picture:
    return pictures[group][i % len(pictures[group])]
