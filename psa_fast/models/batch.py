"""A batch as both parts of PsaVLM's forward pass read it: its vision pass, embeddings and positions, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from psa_fast.models.families import Family, Rows
from psa_fast.models.image_features import Features, GridFeatures, ImageFeatures
from psa_fast.models.packing import Packing
from psa_fast.models.placeholders import count_images
from psa_fast.pictures import Grid, Images, Pictures

if TYPE_CHECKING:
    from psa_fast.models.psa import PsaVLM


class Batch(NamedTuple):
    """What both parts of a forward pass read: images once, and what they stand for.

    `features` is h_o as the family gives it, of a blank image if there is none; `counts` the images of each row or
    sample.
    """

    rows: Rows
    packing: Packing | None
    features: Tensor | GridFeatures
    counts: list[int]


def read_batch_inputs(
    psa: PsaVLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    lengths: Sequence[int] | None,
    images: Images | None,
    vision_features: Tensor | None,
    image_counts: Tensor | None,
    position_ids: Tensor | None,
) -> Batch:
    """Run the vision tower and check that images, counts and placeholders agree. Arguments as for PsaVLM.forward."""
    family, config = psa.family, psa.config
    packing = None if lengths is None else Packing.of_row(lengths, input_ids, attention_mask)
    embeds = family.embed(psa.vlm, input_ids)
    given = images if vision_features is None else vision_features
    placeholders = input_ids == family.image_token_id
    counts = count_images(config, placeholders, _tokens_of(given, config.image_tokens), image_counts, packing)
    features: Tensor | GridFeatures
    if vision_features is not None:
        if images is not None:
            raise ValueError("give either pixel_values or vision_features")
        if config.image_tokens is None:
            family.require("--feature_cache")
        shape = (config.fixed_image_tokens, config.vision_hidden_size)
        features = (vision_features if any(counts) else vision_features.new_zeros(1, *shape)).to(embeds.dtype)
    else:
        shown = images if images is not None and any(counts) else family.blank_image(input_ids.device)
        features = family.vision_features(psa.vlm, shown)
    if position_ids is None:
        grids = images.grids if isinstance(images, Pictures) else []
        position_ids = positions_of(
            family, config.num_safety_tokens, input_ids, grids, counts, attention_mask=attention_mask, lengths=lengths
        )
    return Batch(Rows(input_ids, embeds, attention_mask, position_ids), packing, features, counts)


def positions_of(
    family: Family,
    safety_tokens: int,
    input_ids: Tensor,
    grids: Sequence[Sequence[Grid]],
    counts: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor | None:
    """The family's own position ids [P, B, T] of rows that come without; None where positions count the tokens.

    It reads the ids back from the device: data.collate and data.pack give positions along.
    """
    if family.positions([], 0, []) is None:
        return None
    ids = input_ids.tolist()
    if lengths is None:
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = [[i for i, real in enumerate(row) if real] for row in kept.tolist()]
        rows = [[row[i] for i in place] for row, place in zip(ids, places, strict=True)]
    else:
        parts = torch.tensor(ids[0]).split(list(lengths))
        rows = [part.tolist() for part in parts]
    first = 0
    found: list[Tensor] = []
    for row, count in zip(rows, counts, strict=True):
        own = family.positions(row, safety_tokens, grids[first : first + count])
        assert own is not None  # a family that has positions has them for every row
        found.append(own)
        first += count
    if lengths is not None:
        return torch.cat(found, 1).unsqueeze(1).to(input_ids.device)
    laid = torch.zeros(len(found[0]), *input_ids.shape, dtype=torch.int64)
    for number, (own, place) in enumerate(zip(found, places, strict=True)):
        laid[:, number, place] = own
    return laid.to(input_ids.device)


def tokens_of_features(features: Features | None) -> list[int]:
    """S of each image."""
    if features is None:
        return []
    if isinstance(features, ImageFeatures):
        return [features.projected.shape[1]] * features.images
    assert features.projected is not None
    return features.projected.sizes


def _tokens_of(images: Images | None, fixed: int | None) -> list[int]:
    if images is None:
        return []
    if isinstance(images, Pictures):
        return images.tokens
    return [fixed or 0] * images.shape[0]
