"""Where the reading that decided a verdict looked in the pictures: for people to see, the guard itself never asks."""

from __future__ import annotations

from typing import Any

import torch

from psa_fast.safety.guard import Guard
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict


@torch.inference_mode()
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
    model: Any = guard.model
    for question in prepared.questions(0):
        if question.picture != verdict.picture or (not question.images) is not verdict.words_alone:
            continue
        asked = [(question.query, None, None), *((part.query, part.number, part.positions) for part in question.parts)]
        for query, number, positions in asked:
            if (query, number) != (verdict.query, verdict.query_number):
                continue
            found: list[list[float] | None] = [None] * prepared.count
            if not question.images or prepared.images is None:
                return found
            weight = next(model.parameters())
            ids = torch.tensor([question.prompt.input_ids], device=weight.device)
            mask = torch.tensor([question.prompt.query_mask], dtype=torch.bool)
            if positions is not None:
                mask = torch.zeros_like(mask)
                mask[0, list(positions)] = True
            text = model.query_text(ids, query_mask=mask.to(weight.device))
            asks = model.bottleneck.queries(model.family.embed(model.vlm, ids), text)
            pixels: Any = prepared.images.pixel_values
            shown = pixels[list(question.images)].to(weight.device, weight.dtype)
            features = model.bottleneck.project_images(model.encode_images(shown))
            if isinstance(features, torch.Tensor):
                rows, sizes = features.flatten(0, 1), [features.shape[1]] * len(features)
            else:
                rows, sizes = features.values, features.sizes
            shares = model.bottleneck.looked_at(rows.unsqueeze(0), asks)[0]
            for place, part in zip(question.images, shares.split(sizes), strict=True):
                found[place] = part.double().tolist()
            return found
    raise ValueError(f"the verdict's reading ({verdict.query}, {verdict.query_number}) is none of the request's")
