"""B1 and B2: plain Hugging Face LLaVA fine-tuning, without any safety module, as a user would otherwise run it.

Stage 2 trains LoRA on the language model, with our rank and modules. Stage 1 has no LoRA; there the connector is
trained beside a frozen language model, as in LLaVA's own first stage. LoRA there would be slower: an easier mark.
B2 adds Liger's kernels to the model, where there is a CUDA device and the package, and groups rows by length.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from baselines.official import add_lora
from ladder import CUDA
from step_forms import Batch, Form
from step_model import Size, same_weights
from torch import Tensor, nn

LIGER = CUDA and find_spec("liger_kernel") is not None


class Stock(Form):
    """B1, or with `liger` the model of B2.

    Args:
        base: its parameters are shared, but for those that are trained.
        size: dimensions.
        stage: 1 or 2.
        dropout: of LoRA.
        liger: replace norms, MLPs and the loss by Liger's (its rotation would be patched for every form).
        name: what the table calls it.
    """

    has_concept = False

    def __init__(
        self, base: nn.Module, size: Size, stage: int, dropout: float = 0.05, liger: bool = False, name: str = "B1"
    ):
        vlm: Any = same_weights(base)
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llava

            apply_liger_kernel_to_llava(model=vlm, rope=False)
        if stage == 2:
            add_lora(vlm, size, dropout, on_head=False)
        else:
            for module in vlm.model.multi_modal_projector.modules():
                for key, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, key, nn.Parameter(parameter.detach().clone()))
        super().__init__(name, vlm.train(), safety_tokens=0)
        self.vlm = vlm

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The model's own loss."""
        keys = ("input_ids", "attention_mask", "pixel_values", "labels")
        return {"lm": self.vlm(**{k: batch[k] for k in keys}, use_cache=False).loss}

    def vision(self, batch: Batch) -> Tensor:
        features = self.vlm.model.get_image_features(
            batch["pixel_values"],
            vision_feature_layer=self.vlm.config.vision_feature_layer,
            vision_feature_select_strategy=self.vlm.config.vision_feature_select_strategy,
        )
        return torch.cat(features.pooler_output)

    def hidden(self, batch: Batch, features: Tensor) -> Tensor:
        embeds = self.vlm.get_input_embeddings()(batch["input_ids"])
        mask = (batch["input_ids"] == self.vlm.config.image_token_id).unsqueeze(-1)
        return self.vlm.model.language_model(
            inputs_embeds=embeds.masked_scatter(mask, features),
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        logits = self.vlm.lm_head(hidden)
        return self.vlm.loss_function(
            logits=logits, labels=batch["labels"], vocab_size=self.vlm.config.text_config.vocab_size
        )
