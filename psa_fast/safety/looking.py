"""Where the concept head's pool looked in the pictures: for people to see, the guard itself never asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from psa_fast.safety.guard import Guard
from psa_fast.safety.reading import Query, Question, Reading
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict


@dataclass(frozen=True)
class Look:
    """Where one reading looked; `query`, `number` and `picture` are the reading's.

    Attributes:
        attention: for each of the request's pictures the share of attention on each of its features, by rows, the mean
            of the attention's heads; None for a picture that the reading was not shown.
        added: the same for each concept, by its name: what a feature adds to the concept's logit, less what it adds to
            all of its head alike (`ConceptBottleneck.contributions`).
    """

    query: Query
    number: int | None
    picture: int | None
    attention: tuple[tuple[float, ...] | None, ...]
    added: dict[str, tuple[tuple[float, ...] | None, ...]]


def looked_at(guard: Guard, request: Request, verdict: Verdict) -> list[list[float] | None]:
    """Attention of the concept head's pool on each picture of a request, in the reading that decided its verdict.

    Args:
        guard: with a concept head.
        request: as it was asked.
        verdict: what `guard` said of it.

    Returns for each picture the shares [image_tokens] that the mean head gave to its features, by rows of the picture;
    the rest went to the head tokens and the other pictures. None for a picture that the reading was not shown.
    Raises ValueError for a request that cannot be read, and for a verdict that is none of its readings.
    """
    prepared = guard.prepare(request)
    for question, query, number, positions in _asked(prepared.questions(0)):
        if (query, number) != (verdict.query, verdict.query_number):
            continue
        if question.picture == verdict.picture and (not question.images) is verdict.words_alone:
            if not question.images:
                return [None] * prepared.count
            look = _look(guard, _features(guard, prepared.images), question, query, number, positions)
            return [None if shares is None else list(shares) for shares in look.attention]
    raise ValueError(f"the verdict's reading ({verdict.query}, {verdict.query_number}) is none of the request's")


def looks(guard: Guard, request: Request, readings: Sequence[Reading]) -> list[Look]:
    """Where readings of a request looked, in their order; those that were shown no picture are left out.

    Raises ValueError for a request that cannot be read.
    """
    prepared = guard.prepare(request)
    places = {
        (question.picture, query, number): (question, positions)
        for question, query, number, positions in _asked(prepared.questions(0))
        if question.images
    }
    features = _features(guard, prepared.images) if places else []
    found = []
    for reading in readings:
        if not reading.words_alone and (place := places.get((reading.picture, reading.query, reading.number))):
            found.append(_look(guard, features, place[0], reading.query, reading.number, place[1]))
    return found


def _asked(
    questions: Sequence[Question],
) -> list[tuple[Question, Query, int | None, Sequence[int] | None]]:
    """Every query of every question: what asks, its number, and the tokens that ask (None: all of the prompt's)."""
    found: list[tuple[Question, Query, int | None, Sequence[int] | None]] = []
    for question in questions:
        found.append((question, question.query, None, None))
        found += [(question, part.query, part.number, part.positions) for part in question.parts]
    return found


@torch.inference_mode()
def _features(guard: Guard, images: Any) -> list[torch.Tensor]:
    """Projected features [cells, E] of each of a request's pictures."""
    model: Any = guard.model
    weight = next(model.parameters())
    pixels = images.pixel_values.to(weight.device, weight.dtype)
    features = model.bottleneck.project_images(model.encode_images(pixels))
    return list(features) if isinstance(features, torch.Tensor) else list(features.split())


@torch.inference_mode()
def _look(
    guard: Guard,
    projected: Sequence[torch.Tensor],
    question: Question,
    query: Query,
    number: int | None,
    positions: Sequence[int] | None,
) -> Look:
    model: Any = guard.model
    weight = next(model.parameters())
    ids = torch.tensor([question.prompt.input_ids], device=weight.device)
    mask = torch.tensor([question.prompt.query_mask], dtype=torch.bool)
    if positions is not None:
        mask = torch.zeros_like(mask)
        mask[0, list(positions)] = True
    text = model.query_text(ids, query_mask=mask.to(weight.device))
    asks = model.bottleneck.queries(model.family.embed(model.vlm, ids), text)
    shown = [projected[place] for place in question.images]
    features = torch.cat(shown).unsqueeze(0)
    attention = model.bottleneck.looked_at(features, asks)
    added = model.bottleneck.contributions(features, asks)[0]

    def by_picture(values: torch.Tensor) -> tuple[tuple[float, ...] | None, ...]:
        parts: list[tuple[float, ...] | None] = [None] * len(projected)
        for place, part in zip(question.images, values.double().split([len(one) for one in shown]), strict=True):
            parts[place] = tuple(part.tolist())
        return tuple(parts)

    names = (*model.config.concepts.types, *model.config.concepts.levels)
    concepts = {name: by_picture(row) for name, row in zip(names, added, strict=True)}
    return Look(query, number, question.picture, by_picture(attention[0]), concepts)
