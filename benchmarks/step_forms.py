"""A training step as a whole and in its parts: what every form that is compared offers, and our own form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from ladder import CUDA, DEVICE, DTYPE
from step_flops import safety_options
from step_model import Size, attention, same_weights
from torch import Tensor, nn

from psa_fast.data import Encoded, collate, pack
from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.models import PsaVLM
from psa_fast.models.packing import SDPA_BY_SAMPLE, Packing
from psa_fast.taxonomy import IGNORE_INDEX
from psa_fast.training.config import TrainConfig
from psa_fast.training.recompute import prepare_language_model
from psa_fast.training.stages import prepare

#: L = L_LM + 10 (L_type + L_level), as the official code weighs them, for every form
CONCEPT_WEIGHT = 10.0
LEARNING_RATE = 1e-4
LORA_ALPHA = 16

Batch = dict[str, Any]


class Form:
    """One way to train on a batch.

    `losses` is the step as its users run it; the other methods are its parts, for the profile.
    """

    #: whether `concept`, and whether `hidden` and `head`, are part of the step
    has_concept = True
    has_language = True

    def __init__(self, name: str, model: nn.Module, safety_tokens: int, safety_prefixes: tuple[str, ...] = ()):
        self.name, self.model, self.safety_tokens = name, model, safety_tokens
        trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        safety = [p for key, p in trained if key.startswith(safety_prefixes)]
        others = [p for key, p in trained if not key.startswith(safety_prefixes)]
        # fused: the optimizer is not what is compared, and costs every form the same a parameter
        self.optimizers = {
            part: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
            for part, params in (("safety modules", safety), ("others", others))
            if params
        }

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """The form's own batch, on the device: rows padded on the right to the longest."""
        return self.to_device(collate(rows, pad_token_id=0))

    def to_device(self, batch: Batch) -> Batch:
        """Tensors on the device, images in the benchmark's dtype."""
        batch["pixel_values"] = batch["pixel_values"].to(DTYPE)
        return {k: v.to(DEVICE) if isinstance(v, Tensor) and k != "image_counts" else v for k, v in batch.items()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted "lm" and "concept" (type plus level), those that the form has."""
        raise NotImplementedError

    def vision(self, batch: Batch) -> Any:
        """Features of the batch's images, projected to the language model's width too."""
        raise NotImplementedError

    def concept(self, batch: Batch, features: Any) -> Tensor:
        """Both concept losses from the features."""
        raise NotImplementedError

    def hidden(self, batch: Batch, features: Any) -> Tensor:
        """Last hidden states [B, T, E]."""
        raise NotImplementedError

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The language loss from the last hidden states."""
        raise NotImplementedError

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step; returns the losses."""
        losses = self.losses(batch)
        total(losses).backward()
        self.update()
        return {name: loss.detach() for name, loss in losses.items()}

    def update(self, only: str | None = None) -> None:
        """Optimizer step of everything, or of one part."""
        for part, optimizer in self.optimizers.items():
            if only in (None, part):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def step_in_parts(self, batch: Batch, part: Any = None) -> dict[str, Tensor]:
        """The same step cut into `PARTS`; each runs inside the context manager `part(name)`."""
        part = part or _no_clock
        losses: dict[str, Tensor] = {}
        with part("vision"):
            features = self.vision(batch)
        if self.has_concept:
            with part("safety modules"):
                losses["concept"] = self.concept(batch, features)
                if losses["concept"].requires_grad:
                    # their graph ends at the frozen features, so that their backward can run here
                    (CONCEPT_WEIGHT * losses["concept"]).backward()
        if self.has_language:
            with part("LLM forward"):
                hidden = self.hidden(batch, features)
            leaf = hidden.detach().requires_grad_()
            with part("loss"):
                losses["lm"] = self.head(leaf, batch)
                losses["lm"].backward()
            with part("backward"):
                hidden.backward(leaf.grad)
        with part("optimizer"):
            self.update("others")
        if self.has_concept:
            with part("safety modules"):
                self.update("safety modules")
        return {name: loss.detach() for name, loss in losses.items()}


#: "safety modules": forward, concept losses, backward and optimizer; "loss": LM head and its gradient
PARTS = ("vision", "safety modules", "LLM forward", "loss", "backward", "optimizer")


def total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum."""
    return torch.stack([(CONCEPT_WEIGHT if name == "concept" else 1.0) * x.float() for name, x in losses.items()]).sum()


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def _no_clock(name: str) -> AbstractContextManager:
    return nullcontext()


class Ours(Form):
    """PsaVLM.forward on packed rows, with the parts of a stage trained as train.py trains them.

    Args:
        base: its parameters are shared, not copied.
        size: dimensions.
        stage: 1 or 2.
        objective: "joint" or "concept" (stage 1 without the language model).
        query: see PsaConfig.
        safety_tokens: None: the size's.
        dropout: of LoRA.
        has_concept: False in stage 2: bottleneck and concept losses are left out, as the LLaVA recipes do.
        packs: False: rows padded to the longest.
        recomputes: every decoder layer runs again in the backward pass.
    """

    def __init__(
        self,
        base: nn.Module,
        size: Size,
        stage: int,
        objective: str = "joint",
        query: str = "prompt",
        safety_tokens: int | None = None,
        dropout: float = 0.05,
        has_concept: bool = True,
        packs: bool = True,
        recomputes: bool = False,
    ):
        tokens = size.safety_tokens if safety_tokens is None else safety_tokens
        torch.manual_seed(1)
        options = safety_options(size) | {"num_safety_tokens": tokens}
        psa = PsaVLM.build(same_weights(base), **options, query=query)
        self.has_language, self.has_concept, self.packs = objective == "joint", has_concept, packs
        config = TrainConfig(
            stage=stage,
            learning_rate=LEARNING_RATE,
            concept_loss_weight=CONCEPT_WEIGHT if has_concept else 0.0,
            stage1_objective=objective,
            lora_r=size.lora_r,
            lora_alpha=LORA_ALPHA,
            lora_dropout=dropout,
        )
        prepare(psa, config)
        prepare_language_model(psa, replace(config, gradient_checkpointing="full" if recomputes else "none"))
        super().__init__(f"ours, {objective}", psa.train(), tokens, ("bottleneck.",))
        self.psa = psa
        if packs and attention() == "sdpa":  # as train.py chooses it for packed rows
            psa.vlm.set_attn_implementation({"text_config": SDPA_BY_SAMPLE})

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Rows end to end, without padding."""
        return self.to_device(pack(rows)) if self.packs else super().batch(rows)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """One call of the model."""
        skipped = {"where"} | (set() if self.has_language else {"labels"})
        skipped |= set() if self.has_concept else set(CONCEPT_LABELS)
        out = self.psa(**{k: v for k, v in batch.items() if k not in skipped}, concept_loss_weight=CONCEPT_WEIGHT)
        losses = {"lm": out.loss_lm} if self.has_language else {}
        return losses | ({"concept": out.loss_type + out.loss_level} if self.has_concept else {})

    def vision(self, batch: Batch) -> Any:
        """Up to the used layer, and the connector where the language model runs."""
        vision = self.psa.family.vision_features(self.psa.vlm, batch["pixel_values"])
        return vision, self.psa.family.project(self.psa.vlm, vision) if self.has_language else None

    def concept(self, batch: Batch, features: Any) -> Tensor:
        """What PsaVLM.forward does without labels, its vision pass apart."""
        kept = {k: v for k, v in batch.items() if k not in ("where", "labels", "pixel_values")}
        out = self.psa(**kept, vision_features=features[0])
        return out.loss_type + out.loss_level

    def hidden(self, batch: Batch, features: Any) -> Tensor:
        """[s_llm ; h_i] in place of the placeholders, then the language model."""
        psa, ids = self.psa, batch["input_ids"]
        embeds = psa.family.embed(psa.vlm, ids)
        embeds = psa.insert_images(embeds, ids, features[1])
        packing = Packing(batch["lengths"], ids.device)
        return psa.family.hidden_states(psa.vlm, embeds, None, packing.position_ids, **packing.attention_kwargs())

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Supervised rows only."""
        aligned = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        return self.psa.family.module(self.psa.vlm, "lm_head")(hidden, labels=aligned)
