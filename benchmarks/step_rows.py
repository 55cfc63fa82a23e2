"""The rows of the step benchmarks: one picture each, texts with lengths as in LLaVA-1.5's instruction mix.

A row's kind is drawn by its share of the mix (arXiv 2310.03744, table 7), its text's tokens from a log-normal
distribution of that kind, cut where a row of 2,048 tokens ends. **Medians, spreads and shares of answers are
assumptions** from what the datasets look like (several short questions a picture, or one long answer; long
conversations from ShareGPT), not a count. Every row has a picture, those from ShareGPT too: the official step needs
one. A size with shorter images has shorter texts in proportion. Words are drawn evenly, one token each.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from step_model import Size, build_processor

from psa_fast.data import Encoded, PsaDataset, load_records
from psa_fast.sandbox.paint import paint
from psa_fast.sandbox.world import GROUPS_WITH_PICTURES, sample_scene
from psa_fast.taxonomy import IGNORE_INDEX


@dataclass(frozen=True)
class Kind:
    """Thousands of records, median tokens of a text, its spread (of the logarithm), the share that is answers."""

    records: int
    median: float
    spread: float
    answers: float


MIX = {
    "conversations, descriptions, reasoning (LLaVA)": Kind(158, 250, 0.5, 0.8),
    "short answers (VQAv2, GQA, OKVQA, OCRVQA, A-OKVQA)": Kind(294, 150, 0.6, 0.15),
    "regions (RefCOCO, VG)": Kind(116, 250, 0.5, 0.5),
    "captions (TextCaps)": Kind(22, 50, 0.3, 0.4),
    "conversations (ShareGPT)": Kind(40, 900, 0.6, 0.85),
}
LONGEST = 2048 - 576 - 64
#: tokens of a text for each of its turns, and those of a turn that are the template's
TURN, TEMPLATE = 40, 5


@dataclass(frozen=True)
class RowShape:
    """Tokens of a row's text, template included, and those with a label."""

    text: int
    supervised: int


def draw_shapes(count: int, size: Size, seed: int = 0) -> list[RowShape]:
    """`count` rows; the same draws for every size, scaled by its image tokens."""
    rng, kinds = np.random.default_rng(seed), list(MIX.values())
    shares = np.array([kind.records for kind in kinds], dtype=float)
    shapes = []
    for kind in (kinds[i] for i in rng.choice(len(kinds), size=count, p=shares / shares.sum())):
        drawn = min(LONGEST, kind.median * math.exp(kind.spread * rng.standard_normal()))
        text = max(12, round(drawn * float(size.length_scale)))
        words = text - 1 - TEMPLATE * turns_of(text)
        # at least a word of question and answer a turn; each answer's end is learned too
        answer = min(max(round(kind.answers * words), turns_of(text)), words - turns_of(text))
        shapes.append(RowShape(text, answer + turns_of(text)))
    return shapes


def turns_of(text: int) -> int:
    """Turns of a text."""
    return max(1, round(text / TURN))


class Rows:
    """Encoded records, with as many placeholders an image as a form wants: `rows[safety tokens][index]`."""

    def __init__(self, folder: Path, vlm: Any, size: Size, count: int, seed: int = 0):
        self.shapes = draw_shapes(count, size, seed)
        records = _records(folder, size, self.shapes, seed)
        self.by_tokens: dict[int, list[Encoded]] = {}
        for tokens in (0, size.safety_tokens):
            dataset = PsaDataset(records, folder, build_processor(vlm, size, tokens, []))
            self.by_tokens[tokens] = [dataset[i] for i in range(len(records))]
        #: tokens of each row without safety tokens and padding: what every form must work through
        self.lengths = [len(row.input_ids) for row in self.by_tokens[0]]
        self.supervised = sum(label != IGNORE_INDEX for row in self.by_tokens[0] for label in row.labels)

    def __getitem__(self, tokens: int) -> list[Encoded]:
        return self.by_tokens[tokens]


def _records(folder: Path, size: Size, shapes: list[RowShape], seed: int) -> list:
    """Labelled records of these shapes, read back through the package's own reader."""
    rng, rows = np.random.default_rng(seed), []

    def words(count: int) -> str:
        # the first words of the vocabulary are the template's; those of build_processor are numbered
        return " ".join(f"zq{i}" for i in rng.integers(size.vocabulary // 2, size=count))

    for i, shape in enumerate(shapes):
        scene = sample_scene(rng, GROUPS_WITH_PICTURES[i % len(GROUPS_WITH_PICTURES)], "train")
        Image.fromarray(paint(scene)).save(folder / f"{i:04d}.png")
        turns = turns_of(shape.text)
        answers = _split(shape.supervised - turns, turns)
        questions = _split(shape.text - 1 - TEMPLATE * turns - sum(answers), turns)
        conversation = []
        for asked, answered in zip(questions, answers, strict=True):
            mark = "" if conversation else "<image>\n"
            conversation.append({"from": "human", "value": mark + words(asked)})
            conversation.append({"from": "gpt", "value": words(answered)})
        row = {"image": f"{i:04d}.png", "safe_type": scene.safe_type, "safe_level": scene.safe_level}
        rows.append({**row, "conversations": conversation})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_records(path, folder)


def _split(total: int, parts: int) -> list[int]:
    """`parts` whole numbers as even as they can be, with this sum."""
    return [(total + i) // parts for i in range(parts)]


def in_order(count: int, batch: int) -> list[list[int]]:
    """Row numbers of each batch, as the records come."""
    return [list(range(i, i + batch)) for i in range(0, count, batch)]


def grouped_by_length(lengths: list[int], batch: int, seed: int = 0) -> list[list[int]]:
    """The same rows, those of like length together, batches in random order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    random.Random(seed).shuffle(batches)
    return batches
