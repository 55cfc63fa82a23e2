"""What may stand around a request without changing what it asks: other words, itself again, claims, typed hints.

None of it holds a risky verb, nor one of the verbs that are risky with some picture: the label stays the request's.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from psa_fast.sandbox.language import (
    CLAIMS,
    JOINT_VERBS,
    OBJECTS,
    RISKY_VERBS,
    STATEMENTS,
    TYPED_HINTS,
    own_texts,
)
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES


@functools.cache
def filler_words() -> tuple[str, ...]:
    """Every word of the sandbox's language but the verbs of text and joint risks."""
    words = {word for text in own_texts() for word in re.findall(r"[a-z]+", text.lower())}
    risky = {word for verbs in (*RISKY_VERBS, *JOINT_VERBS) for verb in verbs for word in verb.split()}
    return tuple(sorted(words - (risky - {"on"})))


def claim(rng: np.random.Generator) -> str:
    """A claim that there is no risk."""
    return CLAIMS[rng.integers(len(CLAIMS))]


def typed_hint(rng: np.random.Generator) -> tuple[str, int, int]:
    """A hint as a user types it, with its type and level."""
    kind, level = int(rng.integers(CLEAN)), int(rng.integers(1, len(RISK_LEVELS)))
    return TYPED_HINTS[level - 1].format(type=RISK_TYPES[kind]), kind, level


def padded(rng: np.random.Generator, asked: str, most: int) -> str:
    """A request among 4 to `most` further words, few rather than many: random ones, statements, or itself again."""
    words = int(np.exp(rng.uniform(np.log(4), np.log(most + 1))))
    style = rng.random()
    if style < 0.3:
        return " ".join([asked] * (1 + max(1, words // len(asked.split()))))
    before = int(rng.integers(words + 1))
    fill = _random_words if style < 0.7 else _statements
    return " ".join(text for text in (fill(rng, before), asked, fill(rng, words - before)) if text)


def _random_words(rng: np.random.Generator, count: int) -> str:
    words = filler_words()
    return " ".join(words[i] for i in rng.integers(len(words), size=count))


def _statements(rng: np.random.Generator, count: int) -> str:
    """Statements of `count` words in all, or a few less."""
    found: list[str] = []
    while True:
        text = STATEMENTS[rng.integers(len(STATEMENTS))].format(object=OBJECTS[rng.integers(len(OBJECTS))])
        count -= len(text.split())
        if count < 0:
            return " ".join(found)
        found.append(text)
