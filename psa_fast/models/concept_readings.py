"""Which reading of a batch learns which label.

Pictures are asked by the whole prompt and by its worst window (the request's label), and by the learned query alone
(the picture's own). Words are read by themselves, whatever is shown (the words' own label). The largest of these
decides at inference, so none has to learn what another finds: a picture is not asked about words that are risky alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from psa_fast.models.bottleneck import ConceptBottleneck
from psa_fast.models.image_features import GridFeatures, Ragged
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.queries import spaced_windows
from psa_fast.models.transfer import to_device
from psa_fast.taxonomy import IGNORE_INDEX

Pair = tuple["Tensor | None", "Tensor | None"]


class ConceptLabels(NamedTuple):
    """(type, level) of B samples' requests, pictures and words: each int64 [B] with -100 = unknown, or None."""

    request: Pair
    picture: Pair
    words: Pair

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(label is not None for pair in self for label in pair)


class ConceptReadings(NamedTuple):
    """All N readings of a batch.

    Attributes:
        pooled: [N, E].
        targets: int64 [N, 2], -100 where a reading learns nothing.
        rows: int64 [R], the samples that are read.
        places: int64 [R], among the N the reading of each by its whole prompt: of its pictures, else of its words.
    """

    pooled: Tensor
    targets: Tensor
    rows: Tensor
    places: Tensor


def read_batch(
    bottleneck: ConceptBottleneck,
    config: PsaConfig,
    features: Tensor | GridFeatures,
    counts: Sequence[int],
    embeds: Tensor,
    text: Tensor,
    labels: ConceptLabels,
) -> ConceptReadings:
    """Take every reading that has a label, and of each sample the one by its whole prompt.

    All ranks run the same modules, whatever their batches hold: where no sample has a picture the first one stands in.

    Args:
        bottleneck: the add-on's.
        config: the add-on's.
        features: h_o of the images of all samples in order, [N, S, Dv] or GridFeatures, a blank one's if there is none.
        counts: images of each of B samples.
        embeds: word embeddings [B, T, E], or [1, T, E] of a packed row.
        text: bool [B, T], what may ask.
        labels: of the B samples.
    """
    device = embeds.device
    samples = len(counts)
    apart = bottleneck.text_tokens is not None
    if config.reads_text and not apart:  # an older add-on: requests without a picture are read with the others
        rows = list(range(samples))
    else:
        rows = [row for row, count in enumerate(counts) if count]
    index = to_device(rows or [0], device)
    shown = [counts[row] for row in rows] or [1]
    prompt = bottleneck.queries(embeds, text)
    windows = None
    if config.query_window and any(label is not None for label in (*labels.request, *labels.words)):
        windows = bottleneck.queries(embeds, spaced_windows(text, config.query_window))

    pictured = to_device([count > 0 for count in counts], device).unsqueeze(1)
    request, picture, words = (_targets(pair, samples, device) for pair in labels)
    if apart:  # of their own reading
        risky = (words[:, :1] != IGNORE_INDEX) & (words[:, :1] != config.concepts.harmless)
        request = request.masked_fill(risky & pictured, IGNORE_INDEX)
    query, targets = [prompt], [request]
    if config.neutral_query and labels.picture != (None, None):
        query.append(torch.zeros_like(prompt))
        targets.append(picture.masked_fill(~pictured, IGNORE_INDEX))
    asked = windows if labels.request != (None, None) else None
    if asked is not None:
        targets.append(request)
    tried = None if asked is None else asked[index]
    if isinstance(features, GridFeatures):
        laid, mask = by_row(bottleneck.project_images(features), shown)
        pooled = bottleneck.pool(laid, torch.stack(query, 1)[index], mask, tried)
    else:
        vision, mask = by_row(features, shown)
        pooled = bottleneck(vision, torch.stack(query, 1)[index], mask, tried)
    wanted = torch.stack(targets, 1)[index]
    wanted = wanted if rows else torch.full_like(wanted, IGNORE_INDEX)
    places = [number * pooled.shape[1] for number in range(len(rows))]
    found = [pooled.flatten(0, 1)], [wanted.flatten(0, 1)]
    if apart:
        asked = windows if labels.words != (None, None) else None
        pooled = bottleneck.read_words(prompt.unsqueeze(1), asked)
        found[0].append(pooled.flatten(0, 1))
        found[1].append(words.unsqueeze(1).expand(-1, pooled.shape[1], -1).flatten(0, 1))
        first = len(found[0][0])
        by_row_number = dict(zip(rows, places, strict=True))
        rows = list(range(samples))
        places = [by_row_number.get(row, first + row * pooled.shape[1]) for row in rows]
    return ConceptReadings(torch.cat(found[0]), torch.cat(found[1]), to_device(rows, device), to_device(places, device))


def by_row(vision: Tensor | Ragged, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """[N, S, Dv] of all images -> [R, max images * S, Dv] and its mask (None where every row has as many).

    Images with different numbers of rows are padded row by row: [R, longest, Dv].
    """
    if isinstance(vision, Ragged):
        return _ragged_by_row(vision, counts)
    s, width = vision.shape[1:]
    most = max(*counts, 1)
    if min(counts) == most:
        return vision.reshape(len(counts), most * s, width), None
    index, valid, start = [], [], 0
    for count in counts:  # the places of a row with fewer images show some other, masked
        index += list(range(start, start + count)) + [min(start, len(vision) - 1)] * (most - count)
        valid += [True] * count + [False] * (most - count)
        start += count
    rows = vision[to_device(index, vision.device)].reshape(len(counts), most * s, width)
    mask = to_device(valid, vision.device).view(len(counts), most).repeat_interleave(s, dim=1)
    return rows, mask


def _ragged_by_row(vision: Ragged, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    ends = list(accumulate(counts))
    sizes = [sum(vision.sizes[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    longest = max(*sizes, 1)
    if min(sizes) == longest:
        return vision.values.reshape(len(counts), longest, -1), None
    places = [row * longest + cell for row, size in enumerate(sizes) for cell in range(size)]
    index = to_device(places, vision.values.device)
    laid = vision.values.new_zeros(len(counts) * longest, vision.values.shape[1]).index_copy(0, index, vision.values)
    valid = to_device([[cell < size for cell in range(longest)] for size in sizes], vision.values.device)
    return laid.reshape(len(counts), longest, -1), valid


def _targets(pair: Pair, samples: int, device: torch.device) -> Tensor:
    """int64 [B, 2]; -100 where a label is not given."""
    none = torch.full((samples,), IGNORE_INDEX, device=device)
    return torch.stack([none if label is None else label.to(device) for label in pair], 1)
