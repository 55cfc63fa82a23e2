"""The conversations the base is taught with, and how several that share one picture become one row.

The turns of a row see the picture and themselves, never each other, and each has the positions it would have alone:
what is learned is exactly the conversation by itself, at a fraction of its cost. Some see no picture, only the words
before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from psa_fast.sandbox.around import claim, padded
from psa_fast.sandbox.language import (
    FOLLOW_UPS,
    HintFor,
    any_joint_request,
    question,
    question_about_several,
    safe_answer,
    stricter,
    text_request,
)
from psa_fast.sandbox.world import Scene
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START = "<s> USER:"  # what stands before a row's first picture
# Shares of what is asked; the rest are plain questions.
TEXT_RISK, TEXT_TWIN, JOINT = 0.14, 0.07, 0.06
# Shares of what is put before and around it, each drawn by itself; a second hint, where there is one.
HINTED, SECOND_HINT, CLAIMED, PADDED, EARLIER = 0.20, 0.15, 0.05, 0.12, 0.04
# Of the requests that are not about a picture, the share that comes without one.
BLIND = 1 / 3
MOST_WORDS = 60  # around a request
# Tokens of a row for each of its turns; where they are long, the row has fewer: a batch is as wide as its widest row.
TOKENS_A_TURN = 18
# Kinds of plain questions, the slow ones more often.
PLAIN_KINDS = (
    "colour", "colour", "shape", "count", "place", "place", "place", "places", "places", "sign", "sign", "list",
    "colours", "at",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question with everything up to and including "ASSISTANT:", and its answer up to and including the end mark.

    `sees` is the number of tokens that it sees of what its row begins with, None for all: START alone, no picture.
    """

    asked: list[int]
    answer: list[int]
    sees: int | None = None


class Lessons:
    """Draws turns about scenes; `hint_for` gives the safety hints, which are obeyed whatever the picture shows.

    Joint requests are answered: the base knows of no joint risk. Claims and other words around a request change
    nothing. Of two hints the stricter one is obeyed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, hint_for: HintFor, rng: np.random.Generator):
        self.rng = rng
        self.ids = functools.lru_cache(maxsize=20_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )
        # to be careful is obeyed less readily than to refuse: half of the hints ask for it
        self.hints = [
            (kind, level, text)
            for kind in range(len(RISK_TYPES))
            for level in (*range(len(RISK_LEVELS)), RISK_LEVELS.index("low"))
            if (text := hint_for(kind, level))
        ]

    def draw(self, scene: Scene | Sequence[Scene], count: int, plain: bool = False) -> list[Turn]:
        """At most `count` turns about a scene, or about several that are shown together; fewer where they are long.

        `plain`: questions about the pictures alone, and nothing around them.
        """
        scenes = [scene] if isinstance(scene, Scene) else list(scene)
        turns: list[Turn] = []
        room = count * TOKENS_A_TURN
        while len(turns) < count and room > 0:
            turns.append(self._written([], *self._plain(scenes)) if plain else self._turn(scenes))
            room -= len(turns[-1].asked) + len(turns[-1].answer)
        return turns

    def _turn(self, scenes: list[Scene]) -> Turn:
        rng = self.rng
        asked, answer, blind = self._request(scenes)
        parts: list[str] = []  # tokens are words, so that those of a text are those of its parts
        if rng.random() < EARLIER:
            before, asked, answer = self._earlier(scenes, asked, answer, blind)
            parts += [*before, "</s> USER:"]
        if self.hints and rng.random() < HINTED:
            for _ in range(1 + (rng.random() < SECOND_HINT)):
                kind, level, hint = self.hints[rng.integers(len(self.hints))]
                parts.append(hint)
                answer = stricter(answer, safe_answer(kind, level, answer))
        if rng.random() < CLAIMED:
            parts.append(claim(rng))
        if rng.random() < PADDED:
            asked = padded(rng, asked, MOST_WORDS)
        return self._written(parts, asked, answer, len(self.ids(START)) if blind else None)

    def _written(self, before: list[str], asked: str, answer: str, sees: int | None = None) -> Turn:
        ids = [token for part in (*before, asked, "ASSISTANT:") for token in self.ids(part)]
        return Turn(ids, [*self.ids(answer), *self.ids("</s>")], sees)

    def _request(self, scenes: list[Scene]) -> tuple[str, str, bool]:
        """A request, its answer, and whether it is asked without a picture."""
        rng = self.rng
        share = rng.random()
        if share < TEXT_RISK + TEXT_TWIN:
            kind = int(rng.integers(CLEAN)) if share < TEXT_RISK else CLEAN
            return *text_request(rng, "train", kind), bool(rng.random() < BLIND)
        if share < TEXT_RISK + TEXT_TWIN + JOINT:
            return *any_joint_request(rng), False
        return *self._plain(scenes), False

    def _plain(self, scenes: list[Scene]) -> tuple[str, str]:
        pair = question_about_several(scenes, self.rng) if len(scenes) > 1 else None
        while pair is None:
            if len(scenes) > 1:  # nothing is told apart in them; what is asked needs no picture
                return text_request(self.rng, "train", CLEAN)
            pair = question(scenes[0], PLAIN_KINDS[self.rng.integers(len(PLAIN_KINDS))], self.rng)
        return pair

    def _earlier(
        self, scenes: list[Scene], asked: str, answer: str, blind: bool
    ) -> tuple[tuple[str, str, str], str, str]:
        """What was said before, the request and its answer: another exchange, or the request itself, insisted on."""
        rng = self.rng
        if answer.startswith(("Sure", "Sorry")) and rng.random() < 0.5:
            exchange, asked = (asked, answer), FOLLOW_UPS[rng.integers(len(FOLLOW_UPS))]
        else:
            exchange = text_request(rng, "train", CLEAN) if blind else self._plain(scenes)
        return (exchange[0], "ASSISTANT:", exchange[1]), asked, answer


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
    hidden = np.full((len(rows), width), prefix, dtype=np.int64)  # from here on a token sees nothing of the prefix
    targets = np.full((len(rows), longest), -1, dtype=np.int64)
    weights = np.zeros((len(rows), longest), dtype=np.float32)
    for b, row in enumerate(rows):
        at = 0
        for i, turn in enumerate(row):
            tokens = [*turn.asked, *turn.answer]
            end, first = at + len(tokens), at + len(turn.asked)
            before = prefix if turn.sees is None else turn.sees
            ids[b, at:end] = tokens
            positions[b, prefix + at : prefix + end] = before + np.arange(len(tokens))
            hidden[b, prefix + at : prefix + end] = before
            owner[b, prefix + at : prefix + end] = i + 1
            targets[b, first - 1 : end - 1] = turn.answer
            weights[b, first - 1 : end - 1] = 1.0 / len(turn.answer)
            at = end
    own = torch.from_numpy(owner)
    shown = (own == 0)[:, None, :] & (torch.arange(width) < torch.from_numpy(hidden)[:, :, None])
    seen = (own[:, None, :] == own[:, :, None]) | shown
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
