"""Images of a batch's rows, told by their placeholders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psa_fast.compat.torch import assert_on_device
from psa_fast.models.packing import Packing
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.transfer import to_device


def count_images(
    config: PsaConfig,
    placeholders: Tensor,
    images: Tensor | None,
    image_counts: Tensor | Sequence[int] | None,
    packing: Packing | None = None,
) -> list[int]:
    """Images of each row or sample, checked against the number of images and the placeholders.

    On CUDA a wrong number of placeholders stops the device, which costs a step no synchronisation.

    Args:
        config: the add-on's.
        placeholders: bool [B, T], where input_ids hold one.
        images: the batch's, [N, ...]; None: none.
        image_counts: what the caller says; None: counted.
        packing: of a packed row.

    Raises ValueError if the three do not agree.
    """
    span = config.num_safety_tokens + config.image_tokens
    n = 0 if images is None else images.shape[0]
    found = placeholders.sum(1) if packing is None else packing.count(placeholders)
    counts = [p // span for p in found.tolist()] if image_counts is None else as_list(image_counts)
    if len(counts) != len(found):
        raise ValueError(f"image_counts has {len(counts)} entries for {len(found)} rows")
    if sum(counts) != n:
        raise ValueError(f"the batch has {n} images, its rows ask for {sum(counts)} ({counts})")
    if placeholders.is_cuda:
        wanted = to_device([c * span for c in counts], found.device)
        assert_on_device((found == wanted).all(), "image placeholders and image_counts disagree")
    elif found.tolist() != [c * span for c in counts]:
        raise ValueError(
            f"each image needs {span} placeholders ({config.num_safety_tokens} safety tokens + "
            f"{config.image_tokens}): rows have {found.tolist()} placeholders for {counts} images"
        )
    return counts


def as_list(counts: Tensor | Sequence[int]) -> list[int]:
    """Counts as Python's integers."""
    return [int(c) for c in (counts.tolist() if isinstance(counts, Tensor) else counts)]
