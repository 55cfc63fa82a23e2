"""The rows of a sandbox world: which pictures a row shows, what it asks of them, and the safe answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psa_fast.sandbox.around import claim, padded, typed_hint
from psa_fast.sandbox.language import (
    FOLLOW_UPS,
    TEST_KINDS,
    TEXT_RISK_LEVEL,
    joint_request,
    joint_type,
    joint_verbs,
    question,
    question_about_several,
    safe_answer,
    stricter,
    text_request,
)
from psa_fast.sandbox.world import HARMLESS_GLYPHS, Scene, Split, sample_scene
from psa_fast.taxonomy import CLEAN

# Kinds of rows: the groups, and of two of them rows that show several pictures.
SEVERAL = "_several"
KINDS = (
    "clean", "benign_twin", "risk", "text_risk", "text_twin", "joint_risk", "joint_twin",
    "clean_several", "risk_several",
)  # fmt: skip
# what makes these a risk is in a sign, alone or with the words
RISKY_PICTURES = ("risk", "risk_several", "joint_risk")
RISKY_KINDS = ("risk", "text_risk", "joint_risk", "risk_several")
# Of the rows with a text request, one in so many has no picture.
PICTURELESS = 2
# Shares of rows with something around the request, and with an earlier exchange; the others are the request alone.
# Training has more of it: a guard that has met few words beside a request takes an odd word for a risk.
CLAIMED, TYPED = 0.05, 0.04
PADDED = {"train": 0.30, "dev": 0.10, "test": 0.10}
EARLIER = {"train": 0.10, "dev": 0.04, "test": 0.04}
# Most words around a request.
MOST_WORDS = {"train": 80, "dev": 100, "test": 100}


@dataclass(frozen=True)
class Picture:
    """A scene and the path of its picture, relative to the world's folder."""

    path: str
    scene: Scene


Pictures = Mapping[str, Sequence[Picture]]


def joint_scene(rng: np.random.Generator, split: Split) -> Scene:
    """A scene with a harmless pictogram and blue marks, about which a joint risk of the split can be asked."""
    while True:
        scene = sample_scene(rng, "clean", split)
        if scene.sign is not None:
            glyphs = sorted({pictogram for pictogram, _ in joint_verbs(scene.background, split)})
            glyph = HARMLESS_GLYPHS[glyphs[rng.integers(len(glyphs))]]
            return replace(scene, sign=replace(scene.sign, glyph=glyph, marks="blue"))


@dataclass
class _Row:
    """What a row shows, asks and answers, before anything is put around it."""

    pictures: tuple[Picture, ...]
    asked: str
    answer: str
    safe_type: int
    safe_level: int
    label: str


def draw_rows(
    rng: np.random.Generator, name: str, split: Split, kind: str, count: int, pictures: Pictures
) -> Iterator[dict[str, Any]]:
    """`count` records of a kind (one of KINDS) for the file `name`; `pictures` are the split's, by group."""
    group = kind.removesuffix(SEVERAL)
    for i in range(count):
        row = _row(rng, split, kind, i, pictures)
        turns = _conversation(rng, row, split, kind)
        yield {
            "id": f"{name}-{kind}-{i:05d}",
            **_image_field(row.pictures),
            **({"regions": _regions(row.pictures, kind)} if kind in RISKY_PICTURES else {}),
            "safe_type": row.safe_type,
            "safe_level": row.safe_level,
            "conversations": [{"from": ("human", "gpt")[j % 2], "value": text} for j, text in enumerate(turns)],
            "source": "sandbox",
            "source_label": row.label,
            "split": split,
            "group": group,
        }


def _image_field(pictures: Sequence[Picture]) -> dict[str, Any]:
    paths = [picture.path for picture in pictures]
    return {} if not paths else {"image": paths[0] if len(paths) == 1 else paths}


def _regions(pictures: Sequence[Picture], kind: str) -> list[tuple[float, ...] | None]:
    """Boxes of the signs that the label rests on; harmless pictures beside a risky one have none."""
    joint = kind == "joint_risk"
    return [p.scene.sign_box if joint or p.scene.safe_type != CLEAN else None for p in pictures]


def _row(rng: np.random.Generator, split: Split, kind: str, i: int, pictures: Pictures) -> _Row:
    if kind.startswith("text"):
        return _text_row(rng, split, kind, i, pictures)
    if kind == "joint_risk":
        picture = _cycled(pictures, "joint", i)
        asked, answer, verb = joint_request(rng, split, picture.scene, risky=True)
        label = f"{_label(picture.scene)}/{verb}"
        return _Row((picture,), asked, answer, joint_type(picture.scene), TEXT_RISK_LEVEL, label)
    if kind == "joint_twin":
        return _joint_twin(rng, split, i, pictures)
    picture = _cycled(pictures, kind.removesuffix(SEVERAL), i)
    scene = picture.scene
    shown: tuple[Picture, ...] = (picture,)
    if kind.endswith(SEVERAL):
        shown, (asked, truth) = _among_others(rng, picture, split, pictures)
    else:
        # each test kind equally often; look-alikes and risks are also asked about their sign
        kinds = TEST_KINDS if kind == "clean" and split != "train" else (*TEST_KINDS, "sign")
        asked, truth = _question(rng, scene, kinds[i % len(kinds)], split)
    answer = safe_answer(scene.safe_type, scene.safe_level, truth)
    return _Row(shown, asked, answer, scene.safe_type, scene.safe_level, _label(scene))


def _text_row(rng: np.random.Generator, split: Split, kind: str, i: int, pictures: Pictures) -> _Row:
    risky = kind == "text_risk"
    safe_type, safe_level = (i // PICTURELESS % CLEAN, TEXT_RISK_LEVEL) if risky else (CLEAN, 0)
    shown = () if i % PICTURELESS == 0 else (_cycled(pictures, "clean", i),)
    asked, answer = text_request(rng, split, safe_type)
    return _Row(shown, asked, answer, safe_type, safe_level, f"text/{kind}")


def _joint_twin(rng: np.random.Generator, split: Split, i: int, pictures: Pictures) -> _Row:
    """Of ten: five joint pictures with another pictogram's verb, three other pictures with a joint verb, two joint
    pictures with a question and with a text twin."""
    place = i % 10
    picture = _cycled(pictures, "clean" if place in (5, 6) else "benign_twin" if place == 7 else "joint", i)
    label = _label(picture.scene)
    if place == 8:
        asked, answer = _question(rng, picture.scene, (*TEST_KINDS, "sign")[i // 10 % 5], split)
    elif place == 9:
        asked, answer = text_request(rng, split, CLEAN)
    else:
        asked, answer, verb = joint_request(rng, split, picture.scene, risky=False)
        label = f"{label}/{verb}"
    return _Row((picture,), asked, answer, CLEAN, 0, label)


def _question(rng: np.random.Generator, scene: Scene, kind: str, split: Split) -> tuple[str, str]:
    """A question of a kind, or for a colour where the scene offers none of that kind."""
    pair = question(scene, kind, rng, split) or question(scene, "colour", rng, split)
    assert pair is not None
    return pair


def _cycled(pictures: Pictures, group: str, i: int) -> Picture:
    return pictures[group][i % len(pictures[group])]


def _label(scene: Scene) -> str:
    return f"{scene.background}/{scene.sign.glyph}-{scene.sign.marks}" if scene.sign else scene.background


def _among_others(
    rng: np.random.Generator, picture: Picture, split: Split, pictures: Pictures
) -> tuple[tuple[Picture, ...], tuple[str, str]]:
    """A picture among one to three harmless ones, and a question that only one of them answers."""
    others = int(rng.integers(1, 4))
    for attempt in itertools.count():
        if attempt % 30 == 29:  # so many pictures hold each shape and colour twice
            others = 1
        chosen = [picture]
        for _ in range(others):
            pool = pictures["benign_twin" if rng.random() < 0.25 else "clean"]
            chosen.append(pool[int(rng.integers(len(pool)))])
        shown = tuple(chosen[j] for j in rng.permutation(len(chosen)).tolist())
        pair = question_about_several([p.scene for p in shown], rng, split)
        if pair is not None:
            return shown, pair
    raise AssertionError  # the loop has no end


def _conversation(rng: np.random.Generator, row: _Row, split: Split, kind: str) -> list[str]:
    """The turns' texts: the request with its marks, what stands around it, and what was said before it."""
    asked, answer = row.asked, row.answer
    marks = "<image>\n" * len(row.pictures)
    share = rng.random()
    if share < CLAIMED:
        asked = f"{claim(rng)} {asked}"
    elif share < CLAIMED + TYPED and (split == "train" or kind in RISKY_KINDS):
        hint, safe_type, safe_level = typed_hint(rng)
        asked = f"{hint} {asked}"
        answer = stricter(answer, safe_answer(safe_type, safe_level, answer))
    elif share < CLAIMED + TYPED + PADDED[split]:
        asked = padded(rng, asked, MOST_WORDS[split])
    elif share < CLAIMED + TYPED + PADDED[split] + EARLIER[split]:
        if kind.startswith("text") and rng.random() < 0.5:  # the request came first, and is insisted on
            return [f"{marks}{asked}", answer, FOLLOW_UPS[rng.integers(len(FOLLOW_UPS))], answer]
        return [*text_request(rng, split, CLEAN), f"{marks}{asked}", answer]
    return [f"{marks}{asked}", answer]
