"""The conversations the base is taught with, and how several that share one picture become one row.

The turns of a row see the picture and themselves, never each other, and each has the positions it would have alone:
what is learned is exactly the single-turn conversation, at a fraction of its cost.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from psa_fast.sandbox.language import HintFor, question, safe_answer, text_request
from psa_fast.sandbox.world import Scene
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Shares of turns; the rest are plain questions.
HINTED, TEXT_RISK, TEXT_TWIN = 0.15, 0.13, 0.06
# Kinds of plain questions, the slow ones more often.
PLAIN_KINDS = ("colour", "place", "place", "shape", "count", "sign", "sign", "sign", "list", "colours", "places", "at")


@dataclass(frozen=True)
class Turn:
    """A question with everything up to and including "ASSISTANT:", and its answer up to and including the end mark."""

    asked: list[int]
    answer: list[int]


class Lessons:
    """Draws turns about scenes; `hint_for` gives the safety hints, which are obeyed whatever the picture shows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, hint_for: HintFor, rng: np.random.Generator):
        self.rng = rng
        self.ids = functools.lru_cache(maxsize=None)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )
        self.hints = [
            (kind, level, text)
            for kind in range(len(RISK_TYPES))
            for level in range(len(RISK_LEVELS))
            if (text := hint_for(kind, level))
        ]

    def draw(self, scene: Scene, count: int) -> list[Turn]:
        """`count` turns about a scene."""
        return [self._turn(*self._any(scene)) for _ in range(count)]

    def _turn(self, asked: str, answer: str) -> Turn:
        return Turn([*self.ids(asked), *self.ids("ASSISTANT:")], [*self.ids(answer), *self.ids("</s>")])

    def _any(self, scene: Scene) -> tuple[str, str]:
        rng = self.rng
        share = rng.random()
        if share < TEXT_RISK:
            return text_request(rng, "train", int(rng.integers(CLEAN)))
        if share < TEXT_RISK + TEXT_TWIN:
            return text_request(rng, "train", CLEAN)
        asked, answer = self._plain(scene)
        if self.hints and share < TEXT_RISK + TEXT_TWIN + HINTED:
            kind, level, hint = self.hints[rng.integers(len(self.hints))]
            return f"{hint} {asked}", safe_answer(kind, level, answer)
        return asked, answer

    def _plain(self, scene: Scene) -> tuple[str, str]:
        while True:
            pair = question(scene, PLAIN_KINDS[self.rng.integers(len(PLAIN_KINDS))], self.rng)
            if pair is not None:
                return pair


@dataclass(frozen=True)
class Pack:
    """Rows of turns behind a picture prefix of P tokens.

    `ids` [B, T]; `mask` float [B, 1, P + T, P + T], 0 where a token may look and -inf elsewhere; `positions`
    [B, P + T]; `supervised` bool [B, T] with K true entries, whose next tokens are `targets` [K], weighing `weights`
    [K]: a turn weighs 1 however long its answer is.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    supervised: Tensor
    targets: Tensor
    weights: Tensor


def pack_turns(rows: list[list[Turn]], prefix: int) -> Pack:
    """Pack turns behind prefixes of `prefix` tokens."""
    longest = max(sum(len(t.asked) + len(t.answer) for t in row) for row in rows)
    width = prefix + longest
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    positions[:, :prefix] = np.arange(prefix)
    owner = np.full((len(rows), width), -1, dtype=np.int64)  # 0: the prefix, 1..: a turn, -1: padding
    owner[:, :prefix] = 0
    targets = np.full((len(rows), longest), -1, dtype=np.int64)
    weights = np.zeros((len(rows), longest), dtype=np.float32)
    for b, row in enumerate(rows):
        at = 0
        for i, turn in enumerate(row):
            tokens = [*turn.asked, *turn.answer]
            end, first = at + len(tokens), at + len(turn.asked)
            ids[b, at:end] = tokens
            positions[b, prefix + at : prefix + end] = prefix + np.arange(len(tokens))
            owner[b, prefix + at : prefix + end] = i + 1
            targets[b, first - 1 : end - 1] = turn.answer
            weights[b, first - 1 : end - 1] = 1.0 / len(turn.answer)
            at = end
    own = torch.from_numpy(owner)
    seen = (own[:, None, :] == own[:, :, None]) | (own[:, None, :] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]
    supervised = torch.from_numpy(targets >= 0)
    return Pack(
        ids=torch.from_numpy(ids),
        mask=mask,
        positions=torch.from_numpy(positions),
        supervised=supervised,
        targets=torch.from_numpy(targets)[supervised],
        weights=torch.from_numpy(weights)[supervised],
    )
