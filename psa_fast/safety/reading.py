"""Reading the concept head: in a request's words and with a neutral question, all pictures at once and each alone.

The worst of the readings decides. The concept query is made of the prompt's words, so the words can move the reading of
the image: the same harmless question twenty times over may hide a risk. A fixed question cannot be moved. Nor can one
picture take back what another shows, if each is also read as if it had come alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    """What the concept head gave when it was asked once.

    `query` says whether with the request's own words ("prompt") or with the neutral question; `picture` is the place,
    from 0, of the one picture it was shown, None for all of the request's.
    """

    query: Query
    type_probs: list[float]
    level_probs: list[float]
    picture: int | None = None


class Question(NamedTuple):
    """One row for the concept head: a prompt without a hint, and the places of its images in the features."""

    query: Query
    prompt: Encoded
    images: Sequence[int]
    picture: int | None = None


def read_head(
    model: PsaVLM,
    questions: Sequence[Question],
    features: Any,
    pad: Callable[[Sequence[Sequence[int]], int], torch.Tensor],
) -> list[Reading]:
    """Ask the concept head each question, in one pass.

    Args:
        model: the model.
        questions: each has at least one image.
        features: of all images, from `model.encode_images`.
        pad: makes a [rows, longest] tensor, padded on the right with the value: position 0 must be the prompt's first
            token, as in training.
    """
    if not questions:
        return []
    ids = pad([question.prompt.input_ids for question in questions], 0)
    mask = pad([question.prompt.query_mask for question in questions], 0).bool()
    counts = torch.tensor([len(question.images) for question in questions], device=ids.device)
    chosen = take(features, [image for question in questions for image in question.images])
    logits = model.concept_logits(chosen, counts, ids, mask).double()
    types, levels = logits.split([len(RISK_TYPES), len(RISK_LEVELS)], dim=-1)
    rows = zip(questions, types.softmax(-1).tolist(), levels.softmax(-1).tolist(), strict=True)
    return [Reading(question.query, kinds, degrees, question.picture) for question, kinds, degrees in rows]


def take(features: Any, images: Sequence[int]) -> Any:
    """The features of some images, in that order; an image may come several times."""
    if isinstance(features, torch.Tensor):
        return features[list(images)]
    return type(features)(*(tensor[list(images)] for tensor in features))


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
