"""The loss that keeps a vision tower's features of attacked pictures where the original's clean ones are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adversarial import PixelScale, attack, feature_distance


def fare_loss(
    features_of: Callable[[Tensor], Tensor],
    reference: Tensor,
    pixels: Tensor,
    scale: PixelScale,
    *,
    eps: float,
    steps: int,
    clean_weight: float,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """FARE (arXiv 2402.12336) with a term on clean pictures; no labels are used.

    Args:
        features_of: the trained tower, pixel values [N, C, H, W] -> [N, S, Dv].
        reference: features [N, S, Dv] of the clean pictures by the original tower.
        pixels: the clean pictures.
        scale: of the processor.
        eps, steps, step_size, generator: of the attack, see `attack`.
        clean_weight: of the distance on clean pictures; 0 leaves that pass out.

    Returns:
        The loss, a scalar with a graph, and the distance [N] of the attacked pictures' features, without one.
    """
    attacked = attack(
        pixels, lambda x: feature_distance(features_of(x), reference), scale, eps, steps, step_size, generator
    )
    distance = feature_distance(features_of(attacked), reference)
    loss = distance.mean()
    if clean_weight:
        loss = loss + clean_weight * feature_distance(features_of(pixels), reference).mean()
    return loss, distance.detach()
