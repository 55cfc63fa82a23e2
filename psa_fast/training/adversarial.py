"""Attacked pictures to train on: PGD within a box of pixel values, and the distance of features that it widens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.taxonomy import IGNORE_INDEX


@dataclass(frozen=True)
class PixelScale:
    """What one step of an 8-bit pixel and the ends of its range are after the processor's normalisation.

    Attributes:
        mean: [1, C, 1, 1] of the processor, in [0, 1].
        std: [1, C, 1, 1] of the processor, positive.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, image_processor: Any) -> PixelScale:
        """That of a transformers image processor.

        Raises:
            ValueError: it does not scale 8-bit pixels to [0, 1] and normalise them, so no budget in 8-bit steps fits.
        """
        factor = getattr(image_processor, "rescale_factor", None)
        rescales = getattr(image_processor, "do_rescale", False) and factor and abs(factor * 255 - 1) < 1e-6
        if not rescales or not getattr(image_processor, "do_normalize", False):
            raise ValueError(
                "attacks on pixels need an image processor that rescales pixels by 1/255 and normalises them; this one "
                f"has do_rescale {getattr(image_processor, 'do_rescale', None)}, rescale_factor {factor}, "
                f"do_normalize {getattr(image_processor, 'do_normalize', None)}"
            )
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
        return cls(mean, std)

    def room(self, pixels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The least and the largest change in 8-bit steps, within eps, that stays between black and white."""
        value = (pixels.float() * self.std.to(pixels.device) + self.mean.to(pixels.device)) * 255
        # the 8-bit value again, where it is one: rounding errors must not take a whole step from the budget
        value = torch.where((value - value.round()).abs() < 1e-2, value.round(), value).clamp(0, 255)
        return (-value).clamp(min=-eps), (255 - value).clamp(max=eps)

    def change(self, pixels: Tensor, steps: Tensor) -> Tensor:
        """Pixel values [N, C, H, W] changed by 8-bit steps of the same shape; a gradient passes to `steps`."""
        return pixels + (steps / 255 / self.std.to(steps.device)).to(pixels.dtype)


def attack(
    pixels: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    scale: PixelScale,
    eps: float,
    steps: int,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """PGD in L_inf from a random start: pixel values that make a loss large.

    Only the pixels get a gradient: the parameters' `.grad` stay as they are.

    Args:
        pixels: clean pictures [N, C, H, W], normalised.
        loss_of: pixel values -> a differentiable loss, any shape, summed. It is the very loss that is then trained.
        scale: of the processor.
        eps: budget in 8-bit steps; what is returned is a whole number of them away from `pixels`.
        steps: gradient steps; 0 gives random noise.
        step_size: in 8-bit steps; None: 2.5 eps / steps, at most eps.
        generator: of the random start; None: torch's own.
        start: the random start itself, fp32 in [0, 1) of the pixels' shape, as `random_start` draws it.

    Returns:
        Pixel values [N, C, H, W] without a graph.
    """
    clean = pixels.detach()
    size = min(eps, 2.5 * eps / max(steps, 1)) if step_size is None else step_size
    drawn = start
    if drawn is None:
        drawn = torch.rand(clean.shape, generator=generator, device=clean.device, dtype=torch.float32)
    # bounds on the change itself: a clamp of the picture would have no gradient where the start lies outside
    least, most = scale.room(clean, eps)
    delta = ((2 * drawn - 1) * eps).clamp(least, most)
    for _ in range(steps):
        delta.requires_grad_(True)
        with torch.enable_grad():
            loss = loss_of(scale.change(clean, delta)).sum()
        (slope,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + size * slope.sign()).clamp(least, most)
    # a picture has no fraction of a step
    return scale.change(clean, delta.detach().round().clamp(least.ceil(), most.floor())).detach()


def random_start(batch: Mapping[str, Any], seed: int, step: int) -> Tensor:
    """Where attacks on a collated batch begin: fp32 in [0, 1) of its pictures' shape [N, C, H, W], on the CPU.

    It depends on the seed, the step and the row's line alone: not on ranks, micro-batches or what was drawn before, so
    a resumed run attacks as the whole one does.
    """
    pixels = batch["pixel_values"]
    drawn = []
    for where, count in zip(batch["where"], batch["image_counts"].tolist(), strict=True):
        line = where.rpartition(":")[2]  # the path may differ where a run goes on
        digest = hashlib.sha256(f"attack {seed} {step} {line}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn.append(torch.rand(count, *pixels.shape[1:], generator=generator))
    return torch.cat(drawn)


@dataclass(frozen=True)
class ConceptAttack:
    """Stage 1's adversarial term: the concept loss on pixels that were changed to make that loss large.

    Attributes:
        weight: of the loss on attacked pixels, beside the clean one.
        eps: budget in 8-bit steps.
        steps: of PGD.
        first_step: the first optimizer step with the term.
        seed: of the random starts.
        scale: of the processor.
        label_smoothing: of the loss that is trained, so that the attack raises the same one.
    """

    weight: float
    eps: float
    steps: int
    first_step: int
    seed: int
    scale: PixelScale
    label_smoothing: float = 0.0

    def inputs(self, model: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Arguments of PsaVLM.forward for the concept loss on attacked pixels; the language model is left out.

        Rows without a picture keep no label: nothing of theirs can be attacked, and the clean pass has counted them.

        Args:
            model: PsaVLM, whose parameters get no gradient here.
            batch: collated, on the CPU.
            inputs: the same on the model's device, with the concept labels, without what forward does not take.
            step: of the run, from 1.
        """
        changed = {name: value for name, value in inputs.items() if name != "labels"}
        pictured = batch["image_counts"] > 0
        words = batch.get("words_type")
        # what the words say by themselves is read without the pixels
        asked = (
            pictured
            if words is None
            else pictured & ((words == IGNORE_INDEX) | (words == model.config.concepts.harmless))
        )
        taught = {"safe": asked, "picture": pictured, "words": torch.zeros_like(pictured)}
        for name in CONCEPT_LABELS:
            if changed.get(name) is not None:
                label = changed[name]
                changed[name] = label.masked_fill(~taught[name.split("_")[0]].to(label.device), IGNORE_INDEX)
        pixels = changed["pixel_values"]
        if pixels is None:
            return changed

        def loss_of(attacked: Tensor) -> Tensor:
            return model(**{**changed, "pixel_values": attacked}, label_smoothing=self.label_smoothing).loss

        start = random_start(batch, self.seed, step).to(pixels.device)
        return {**changed, "pixel_values": attack(pixels, loss_of, self.scale, self.eps, self.steps, start=start)}


def feature_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance to the original's features over their variance: fp32 [N] of two [N, S, Dv].

    No gradient passes to `reference`.
    """
    original = reference.detach().float()
    apart = (features.float() - original).square().flatten(1).mean(1)
    return apart / original.var(correction=0).clamp(min=torch.finfo(torch.float32).tiny)
