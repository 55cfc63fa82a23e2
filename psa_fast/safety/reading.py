"""Reading the concept head: with several queries, all pictures at once and each alone.

The worst of the readings decides. The concept query is made of the prompt's words, so the words can move the reading of
the image: the same harmless question twenty times over may hide a risk. The learned query alone (in older add-ons a
fixed question) cannot be moved, a window of the prompt cannot be diluted, and no picture can take back what another
shows, if each is also read as if it had come alone. What the words say by themselves is read without any picture: no
picture can hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from psa_fast.data.chat import Encoded
from psa_fast.models.queries import window_starts
from psa_fast.pictures import Pictures
from psa_fast.safety.policy import ACTIONS, Decision, Policy
from psa_fast.taxonomy import RISK_TYPES

if TYPE_CHECKING:
    from psa_fast.models import PsaVLM
    from psa_fast.models.image_features import Ragged

# short, about the image and about nothing in it; the sandbox's word-level vocabulary has all of its words
NEUTRAL_QUESTION = "What do you see?"
#: what asks: the whole prompt, the learned query alone (or the neutral question), one user's turn, one window
Query = Literal["prompt", "neutral", "turn", "window"]
#: queries that one launch takes together, padding included; a row of more is a launch of its own
QUERIES_PER_LAUNCH = 512


@dataclass(frozen=True)
class Reading:
    """What the concept head gave when it was asked once.

    Attributes:
        query: what asked.
        type_probs, level_probs: 7 and 4 probabilities.
        picture: place, from 0, of the one picture that was shown, None for all of the request's.
        number: of the turn or window, from 0; None for the other queries.
        span: the prompt's tokens from the first to behind the last that asked, for a turn or window.
        logits: the 7 + 4 numbers that the probabilities come from, before the policy's temperatures.
        words_alone: whether no picture was shown: the words were read by themselves.
    """

    query: Query
    type_probs: list[float]
    level_probs: list[float]
    picture: int | None = None
    number: int | None = None
    span: tuple[int, int] | None = None
    logits: list[float] | None = None
    words_alone: bool = False

    def under(self, temperatures: tuple[float, float], types: int = len(RISK_TYPES)) -> Reading:
        """The same reading with the probabilities of other temperatures, the first `types` logits being the types'.

        Raises ValueError if it holds no logits.
        """
        if self.logits is None:
            raise ValueError("the reading's logits were not kept, so no other policy can decide on it")
        kinds, levels = probabilities(torch.tensor(self.logits, dtype=torch.float64), temperatures, types)
        return replace(self, type_probs=kinds.tolist(), level_probs=levels.tolist())


class Part(NamedTuple):
    """A query of some of a prompt's tokens: their positions, none for the learned query alone."""

    query: Query
    positions: Sequence[int]
    number: int | None = None

    @property
    def span(self) -> tuple[int, int] | None:
        """From the first token to behind the last; None without a number."""
        return None if self.number is None or not self.positions else (self.positions[0], self.positions[-1] + 1)


class Question(NamedTuple):
    """One row for the concept head: a prompt without a hint, and the places of its images in the features.

    It is asked with all of the prompt's text, under the name `query`, and with each of `parts`. Without images the
    words are read by themselves.
    """

    query: Query
    prompt: Encoded
    images: Sequence[int]
    picture: int | None = None
    parts: Sequence[Part] = ()


def parts_of(prompt: Encoded, image_token_id: int, window: int, neutral: bool) -> list[Part]:
    """The further queries of a prompt: the learned query alone, every user's turn if there are several, all windows.

    Args:
        prompt: without a hint.
        image_token_id: of the placeholders, which part no turn.
        window: tokens of a window over the text of all turns; 0: no windows.
        neutral: whether the learned query alone asks.
    """
    text = [i for i, asked in enumerate(prompt.query_mask) if asked]
    turns: list[list[int]] = []
    answered = True
    for i, asked in enumerate(prompt.query_mask):
        if asked:
            if answered:
                turns.append([])
            turns[-1].append(i)
            answered = False
        elif prompt.input_ids[i] != image_token_id:  # an answer between two turns
            answered = True
    parts = [Part("neutral", ())] if neutral else []
    if len(turns) > 1:
        parts += [Part("turn", turn, number) for number, turn in enumerate(turns)]
    starts = window_starts(len(text), window)
    return parts + [Part("window", text[start : start + window], number) for number, start in enumerate(starts)]


def read_head(
    model: PsaVLM,
    questions: Sequence[Question],
    features: Any,
    pad: Callable[[Sequence[Sequence[int]], int], torch.Tensor],
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> list[Reading]:
    """Ask the concept head each question; per question the reading by `query`, then those by its parts.

    Arguments as for `read_logits`, whose rows these are; the logits of types and levels are divided by `temperatures`
    for the probabilities.
    """
    logits = read_logits(model, questions, features, pad).double()
    types, levels = probabilities(logits, temperatures, model.config.head_sizes[0])
    asked = [(question, part) for question in questions for part in (Part(question.query, ()), *question.parts)]
    rows = zip(asked, types.tolist(), levels.tolist(), logits.tolist(), strict=True)
    return [
        Reading(
            part.query, kinds, degrees, question.picture, part.number, part.span, given, words_alone=not question.images
        )
        for (question, part), kinds, degrees, given in rows
    ]


def probabilities(
    logits: torch.Tensor, temperatures: tuple[float, float], types: int = len(RISK_TYPES)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [..., 7 + 4] as probabilities of types [..., 7] and of levels [..., 4], each with its temperature."""
    kinds, levels = logits[..., :types], logits[..., types:]
    return (kinds / temperatures[0]).softmax(-1), (levels / temperatures[1]).softmax(-1)


def read_logits(
    model: PsaVLM,
    questions: Sequence[Question],
    features: Any,
    pad: Callable[[Sequence[Sequence[int]], int], torch.Tensor],
) -> torch.Tensor:
    """Logits [queries, 7 + 4] of all questions, one row for each query in their order; differentiable.

    Args:
        model: the model.
        questions: what is asked, see `Question`.
        features: of all images, from `model.encode_images`; None if no question has one.
        pad: makes a [rows, longest] tensor, padded on the right with the value: position 0 must be the prompt's first
            token, as in training.
    """
    found = []
    start = 0
    # each picture once, in however many rows it is read
    projected = None if features is None else model.bottleneck.project_images(features)
    while start < len(questions):
        end, most = start, 0
        while end < len(questions):
            widest = max(most, 1 + len(questions[end].parts))
            if end > start and widest * (end + 1 - start) > QUERIES_PER_LAUNCH:
                break
            end, most = end + 1, widest
        found += _launch(model, questions[start:end], projected, pad)
        start = end
    return torch.cat(found) if found else torch.zeros(0, sum(model.config.head_sizes))


def _launch(
    model: PsaVLM,
    questions: Sequence[Question],
    projected: torch.Tensor | Ragged | None,
    pad: Callable[[Sequence[Sequence[int]], int], torch.Tensor],
) -> list[torch.Tensor]:
    """Per question its logits [1 + parts, 7 + 4], from one launch."""
    ids = pad([question.prompt.input_ids for question in questions], 0)
    mask = pad([question.prompt.query_mask for question in questions], 0).bool()
    counts = torch.tensor([len(question.images) for question in questions], device=ids.device)
    images = [image for question in questions for image in question.images]
    chosen = take(projected, images) if images and projected is not None else None
    most = max(len(question.parts) for question in questions)
    if not most:
        return list(model.concept_logits(None, counts, ids, mask, projected=chosen).split(1))
    places = [
        (row, number, position)
        for row, question in enumerate(questions)
        for number, part in enumerate(question.parts, 1)
        for position in part.positions
    ]
    masks = torch.zeros(len(questions), 1 + most, ids.shape[1], dtype=torch.bool)
    if places:
        masks[tuple(torch.tensor(places).unbind(1))] = True
    masks = masks.to(ids.device)
    masks[:, 0] = mask
    logits = model.concept_logits(None, counts, ids, masks, projected=chosen)
    return [row[: 1 + len(question.parts)] for question, row in zip(questions, logits, strict=True)]


def take(features: Any, images: Sequence[int]) -> Any:
    """The features of some images, in that order; an image may come several times."""
    return features[list(images)] if isinstance(features, torch.Tensor | Pictures) else features.take(images)


class Weighed(NamedTuple):
    """The reading that the policy treats most strictly, its decision, and the highest unsafe score of all readings.

    A request is flagged at every threshold up to that score, if no type is off; the reading that decides need not have
    it, since a stricter action comes first. It is None if a reading is not a number.
    """

    reading: Reading
    decision: Decision
    highest_score: float | None


def weigh(policy: Policy, readings: Sequence[Reading]) -> Weighed:
    """Let the policy decide on each reading, and on the turns together; the strictest counts, the first of equal ones.

    No number anywhere comes before a risk, a risk before none, then the stricter action, the higher level, the score.
    """
    decided = [(reading, policy.decide(reading.type_probs, reading.level_probs)) for reading in readings]
    scores = [decision.unsafe_score for _, decision in decided]
    highest = None if None in scores else max(score for score in scores if score is not None)
    reading, decision = max(decided, key=lambda pair: _strictness(pair[1]))
    if (remembered := over_turns(policy, readings)) is not None:
        if _strictness(remembered[1]) > _strictness(decision) and remembered[1].code == "accumulated":
            reading, decision = remembered
        decision = replace(decision, accumulated=remembered[1].accumulated)
    return Weighed(reading, decision, highest)


def over_turns(policy: Policy, readings: Sequence[Reading]) -> tuple[Reading, Decision] | None:
    """What a policy with a memory decides on the user's turns together, and the reading of the one that adds the most.

    A turn is read by its words alone: a picture is read with every turn, and would count again with each. None where
    the policy has no memory and for fewer than two turns.
    """
    turns = sorted(
        (reading for reading in readings if reading.query == "turn" and reading.words_alone),
        key=lambda reading: reading.number or 0,
    )
    found = policy.decide_over_turns([(reading.type_probs, reading.level_probs) for reading in turns])
    return None if found is None else (turns[found[0]], found[1])


def require_turns(policy: Policy, config: Any) -> None:
    """Raise ValueError for a policy with a memory where an add-on's config reads no turn by its words alone."""
    if policy.memory is not None and not config.num_text_tokens:
        raise ValueError("the policy has a memory, but the add-on reads no turn's words alone, so nothing would add up")


def strictest_first(policy: Policy, readings: Sequence[Reading]) -> list[Reading]:
    """The readings in the order in which they count, equal ones as they came."""
    key = [_strictness(policy.decide(reading.type_probs, reading.level_probs)) for reading in readings]
    return [readings[place] for place in sorted(range(len(key)), key=lambda place: key[place], reverse=True)]


def _strictness(decision: Decision) -> tuple[bool, bool, int, int, float]:
    level = decision.level if decision.code in ("unsafe", "accumulated") and decision.level is not None else 0
    score = decision.unsafe_score or 0.0
    return decision.code == "not_finite", decision.unsafe, ACTIONS.index(decision.action), level, score
