"""Images of a batch's rows, told by their placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from psa_fast.compat.torch import assert_on_device
from psa_fast.models.packing import Packing
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.transfer import to_device


def count_images(
    config: PsaConfig,
    placeholders: Tensor,
    tokens: Sequence[int],
    image_counts: Tensor | Sequence[int] | None,
    packing: Packing | None = None,
) -> list[int]:
    """Images of each row or sample, checked against the number of images and the placeholders.

    On CUDA a wrong number of placeholders stops the device, which costs a step no synchronisation.

    Args:
        config: the add-on's.
        placeholders: bool [B, T], where input_ids hold one.
        tokens: S of each of the batch's images.
        image_counts: what the caller says; None: counted.
        packing: of a packed row.

    Raises ValueError if the three do not agree.
    """
    n, safety = len(tokens), config.num_safety_tokens
    found = placeholders.sum(1) if packing is None else packing.count(placeholders)
    counts = _counted(found.tolist(), tokens, config) if image_counts is None else as_list(image_counts)
    if len(counts) != len(found):
        raise ValueError(f"image_counts has {len(counts)} entries for {len(found)} rows")
    if sum(counts) != n:
        raise ValueError(f"the batch has {n} images, its rows ask for {sum(counts)} ({counts})")
    ends = list(accumulate(counts))
    wanted = [sum(tokens[end - count : end]) + count * safety for end, count in zip(ends, counts, strict=True)]
    if placeholders.is_cuda:
        agrees = (found == to_device(wanted, found.device)).all()
        assert_on_device(agrees, "image placeholders and image_counts disagree")
    elif found.tolist() != wanted:
        if config.image_tokens is None:
            raise ValueError(f"rows have {found.tolist()} placeholders, their images need {wanted}")
        raise ValueError(
            f"each image needs {safety + config.image_tokens} placeholders ({safety} safety tokens + "
            f"{config.image_tokens}): rows have {found.tolist()} placeholders for {counts} images"
        )
    return counts


def _counted(found: list[int], tokens: Sequence[int], config: PsaConfig) -> list[int]:
    """Images of rows with these numbers of placeholders; those of different sizes are dealt out in order."""
    if config.image_tokens is not None:
        return [placeholders // (config.num_safety_tokens + config.image_tokens) for placeholders in found]
    counts, image = [], 0
    for placeholders in found:
        first = image
        while placeholders > 0 and image < len(tokens):
            placeholders -= tokens[image] + config.num_safety_tokens
            image += 1
        counts.append(image - first)
    return counts


def as_list(counts: Tensor | Sequence[int]) -> list[int]:
    """Counts as Python's integers."""
    return [int(c) for c in (counts.tolist() if isinstance(counts, Tensor) else counts)]
