"""Reading the concept head: each request with its own words and with a neutral question, and the worse of the two.

The concept query is made of the prompt's words, so the words can move the reading of the image: the same harmless
question twenty times over may hide a risk. A fixed question cannot be moved; whichever reading is the worse decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from psa_fast.data.chat import Encoded
from psa_fast.safety.policy import ACTIONS, Decision, Policy
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

if TYPE_CHECKING:
    from psa_fast.models import PsaVLM

# short, about the image and about nothing in it; the sandbox's word-level vocabulary has all of its words
NEUTRAL_QUESTION = "What do you see?"
Query = Literal["prompt", "neutral"]


@dataclass(frozen=True)
class Reading:
    """What the concept head gave for one request, asked with its own words ("prompt") or with the neutral question."""

    query: Query
    type_probs: list[float]
    level_probs: list[float]


def read_head(
    model: PsaVLM,
    query: Query,
    prompts: Sequence[Encoded],
    counts: Sequence[int],
    features: Any,
    pad: Callable[[Sequence[Sequence[int]], int], torch.Tensor],
) -> list[Reading]:
    """Ask the concept head once for each request.

    Args:
        model: the model.
        query: what the prompts are.
        prompts: one for each request, without hints.
        counts: images of each request, at least one.
        features: of all images in their order, from `model.encode_images`.
        pad: makes a [rows, longest] tensor, padded on the right with the value: position 0 must be the prompt's first
            token, as in training.
    """
    ids = pad([prompt.input_ids for prompt in prompts], 0)
    mask = pad([prompt.query_mask for prompt in prompts], 0).bool()
    logits = model.concept_logits(features, torch.tensor(list(counts), device=ids.device), ids, mask).double()
    types, levels = logits.split([len(RISK_TYPES), len(RISK_LEVELS)], dim=-1)
    rows = zip(types.softmax(-1).tolist(), levels.softmax(-1).tolist(), strict=True)
    return [Reading(query, *row) for row in rows]


def worst(policy: Policy, readings: Sequence[Reading]) -> tuple[Reading, Decision]:
    """The reading that the policy treats most strictly, and its decision; the first of equal ones.

    No number anywhere comes before a risk, a risk before none, then the stricter action, the higher level, the score.
    """
    decided = [(reading, policy.decide(reading.type_probs, reading.level_probs)) for reading in readings]
    return max(decided, key=lambda pair: _strictness(pair[1]))


def _strictness(decision: Decision) -> tuple[bool, bool, int, int, float]:
    level = decision.level if decision.code == "unsafe" and decision.level is not None else 0
    score = decision.unsafe_score or 0.0
    return decision.code == "not_finite", decision.unsafe, ACTIONS.index(decision.action), level, score
