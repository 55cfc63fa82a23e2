"""A vision tower whose features of attacked pictures stay where the original's clean ones are, and its losses."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from psa_fast.models import PsaVLM
from psa_fast.taxonomy import IGNORE_INDEX

from .adversarial import PixelScale, attack, feature_distance

WEIGHTS = "tower.safetensors"


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
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """FARE (arXiv 2402.12336) with a term on clean pictures; no labels are used.

    Args:
        features_of: the trained tower, pixel values [N, C, H, W] -> [N, S, Dv].
        reference: features [N, S, Dv] of the clean pictures by the original tower.
        pixels: the clean pictures.
        scale: of the processor.
        eps, steps, step_size, generator, start: of the attack, see `attack`.
        clean_weight: of the distance on clean pictures; with 0 it is measured only.

    Returns:
        The loss, a scalar with a graph, and the distances [N] of attacked and of clean pictures' features, without
        one.
    """
    attacked = attack(
        pixels, lambda x: feature_distance(features_of(x), reference), scale, eps, steps, step_size, generator, start
    )
    distance = feature_distance(features_of(attacked), reference)
    with torch.set_grad_enabled(torch.is_grad_enabled() and clean_weight > 0):
        clean = feature_distance(features_of(pixels), reference)
    loss = distance.mean() + (clean_weight * clean.mean() if clean_weight else 0.0)
    return loss, distance.detach(), clean.detach()


def concept_and_features_loss(
    concept_of: Callable[[Tensor, Tensor | float], Tensor],
    features_of: Callable[[Tensor], Tensor],
    reference: Tensor,
    pixels: Tensor,
    scale: PixelScale,
    *,
    eps: float,
    steps: int,
    num_items: Tensor | float,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Concept loss on clean and attacked pictures, and how far the features of both are from the original's.

    The attack raises the concept loss plus half the features' distance; what is trained is the attacked concept loss
    plus half of the clean one.

    Args:
        concept_of: features [N, S, Dv] and divisors -> a head's losses, summed over the pictures and divided.
        features_of: the trained tower, pixel values -> [N, S, Dv].
        reference: features of the clean pictures by the original tower.
        pixels: the clean pictures.
        scale: of the processor.
        eps, steps, start: of the attack, see `attack`.
        num_items: divisors of the trained concept losses.

    Returns:
        The concept part of the loss; the distances [N] of clean and of attacked pictures, all with a graph.
    """

    def attacked_loss(x: Tensor) -> Tensor:
        features = features_of(x)
        # each picture's own loss, however many there are
        return concept_of(features, 1.0) + 0.5 * feature_distance(features, reference).sum()

    attacked = features_of(attack(pixels, attacked_loss, scale, eps, steps, start=start))
    clean = features_of(pixels)
    concept = 0.5 * concept_of(clean, num_items) + concept_of(attacked, num_items)
    return concept, feature_distance(clean, reference), feature_distance(attacked, reference)


class RobustTower(nn.Module):
    """What stage 0 trains: a base's vision tower, and a concept head that is thrown away at the end.

    Args:
        psa: a new PsaVLM on the base, whose language model's layers need not be there.
        scale: of the base's processor.
        eps, steps: of the attacks.
        clean_weight: of clean pictures' distance in the first phase.
        tie: of the distances in the second.
        trains_head: whether there is a second phase.
    """

    def __init__(
        self,
        psa: PsaVLM,
        scale: PixelScale,
        *,
        eps: float,
        steps: int,
        clean_weight: float,
        tie: float,
        trains_head: bool = True,
    ) -> None:
        super().__init__()
        self.tower = psa.family.module(psa.vlm, "vision")
        self.bottleneck = psa.bottleneck
        self.scale, self.eps, self.steps, self.clean_weight, self.tie = scale, eps, steps, clean_weight, tie
        self.width = psa.config.hidden_size
        #: see checkpoint.gather_addon_state
        self.changed_base_weights: set[str] = set()
        # beside the module's tree: DeepSpeed must neither train nor move nor broadcast them
        original = copy.deepcopy(self.tower).requires_grad_(False).eval()
        self._outside = (psa, original)  # a tuple is no submodule
        self._original_digest = _digest(original)
        self.requires_grad_(False)
        self.bottleneck.requires_grad_(trains_head)
        if self.bottleneck.text_tokens is not None:  # no words are read by themselves here
            self.bottleneck.text_tokens.requires_grad_(False)
        self._train_what_is_used()

    def features(self, pixels: Tensor) -> Tensor:
        """The trained tower's features, [N, C, H, W] -> [N, S, Dv]."""
        psa, _ = self._outside
        found: Any = psa.family.vision_features(psa.vlm, pixels)
        return found

    @torch.no_grad()
    def original_features(self, pixels: Tensor) -> Tensor:
        """The same of the tower as it was."""
        psa, original = self._outside
        original.to(pixels.device)
        return psa.family.features_of_tower(original, pixels)

    def concept_loss(self, features: Tensor, targets: Tensor, num_items: Tensor | float) -> Tensor:
        """Type and level losses of pictures, each asked of the learned query alone.

        Args:
            features: [N, S, Dv].
            targets: int64 [N, 2], -100 = none.
            num_items: divisors of the two sums, one for both or [2].
        """
        nothing_said = features.new_zeros(len(features), self.width)
        pooled = self.bottleneck(features, nothing_said)
        loss = self.bottleneck.loss(pooled, targets, num_items=num_items)
        return loss.loss + 0.0 * loss.logits.sum().to(loss.loss.dtype)

    def forward(
        self, pixels: Tensor, start: Tensor, targets: Tensor, shares: Tensor, concept: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch.

        Args:
            pixels: [N, C, H, W].
            start: of the attacks, as `random_start` draws it.
            targets: int64 [N, 2], type and level of each picture, -100 = unknown.
            shares: fp32 [3]: pictures, types and levels of the global batch, over the ranks.
            concept: the second phase.

        Returns:
            The micro-batch's part of the loss, a mean over the global batch's pictures; and sums without a graph, fp64
            [3]: distances of clean and of attacked pictures, and the concept part of the loss times the pictures.
        """
        reference = self.original_features(pixels)
        if not concept:
            loss, attacked, clean = fare_loss(
                self.features, reference, pixels, self.scale, eps=self.eps, steps=self.steps,
                clean_weight=self.clean_weight, start=start,
            )  # fmt: skip
            sums = torch.stack([clean.sum(), attacked.sum(), attacked.sum() * 0]).double()
            if not self.bottleneck.heads.weight.requires_grad:
                return loss * len(pixels) / shares[0], sums
            # the head learns meanwhile from the original's features, so that the second phase does not begin
            # with noise; nothing of it reaches the tower
            return loss * len(pixels) / shares[0] + self.concept_loss(reference, targets, shares[1:]), sums
        concept_part, clean, attacked = concept_and_features_loss(
            lambda x, items: self.concept_loss(x, targets, items), self.features, reference, pixels, self.scale,
            eps=self.eps, steps=self.steps, num_items=shares[1:], start=start,
        )  # fmt: skip
        sums = torch.stack([clean.sum(), attacked.sum(), concept_part * shares[0]]).detach().double()
        return concept_part + self.tie * (clean.sum() + attacked.sum()) / shares[0], sums

    def save_addon(self, folder: str | Path, state_dict: Mapping[str, Tensor]) -> None:
        """Write tower and head, `tower.safetensors`, with `state_dict` in place of the module's own parameters."""
        state = {name: state_dict.get(name, value) for name, value in self.state_dict().items()}
        found = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(found, Path(folder) / WEIGHTS, metadata={"original": self._original_digest})

    def load_addon(self, folder: str | Path) -> None:
        """Take over what `save_addon` wrote.

        Raises:
            ValueError: it was trained from another tower than this one's original.
        """
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            if (file.metadata() or {}).get("original") != self._original_digest:
                raise ValueError(f"{folder} was trained from another vision tower than the base has now")
        self.load_state_dict(load_file(Path(folder) / WEIGHTS))

    def _train_what_is_used(self) -> None:
        """Unfreeze the tower's parameters that its features depend on: layers beyond the one that is taken do not."""
        psa, _ = self._outside
        named = list(self.tower.named_parameters())
        self.tower.requires_grad_(True)
        blank: Any = psa.family.blank_image(next(self.tower.parameters()).device)
        slopes = torch.autograd.grad(self.features(blank).float().sum(), [p for _, p in named], allow_unused=True)
        for (_, parameter), slope in zip(named, slopes, strict=True):
            parameter.requires_grad_(slope is not None)


def picture_targets(batch: Mapping[str, Any]) -> Tensor:
    """Type and level of each picture of a collated batch, int64 [N, 2]; -100 where a row has several, or no label."""
    counts = batch["image_counts"]
    labels = torch.stack([batch["picture_type"], batch["picture_level"]], 1)
    return labels.masked_fill((counts != 1).unsqueeze(1), IGNORE_INDEX).repeat_interleave(counts, 0)


def tower_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tower's part of what `save_addon` wrote, by the names of the tower's own state_dict."""
    found = load_file(Path(folder) / WEIGHTS)
    return {name.removeprefix("tower."): value for name, value in found.items() if name.startswith("tower.")}


def _digest(module: nn.Module) -> str:
    """SHA-256 of a module's values."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
