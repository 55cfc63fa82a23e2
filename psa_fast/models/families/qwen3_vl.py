"""Qwen3-VL: as Qwen2-VL, with features of earlier tower layers in the language model's first layers (DeepStack)."""

from __future__ import annotations

from typing import Any

import torch

from psa_fast.models.families.family import Tokens
from psa_fast.models.families.qwen2_vl import Qwen2VLFamily
from psa_fast.models.image_features import GridFeatures, Ragged


class Qwen3VLFamily(Qwen2VLFamily):
    """Adapter for transformers' Qwen3VLForConditionalGeneration. The DeepStack mergers are never trained."""

    @property
    def _patch_width(self) -> int:
        return self.config.vision_config.hidden_size

    def extra_features(self, output: Any, sizes: list[int]) -> dict[str, Ragged]:
        """DeepStack's, of each layer in order."""
        return {f"deepstack {layer}": Ragged(rows, sizes) for layer, rows in enumerate(output.deepstack_features)}

    def visual(self, tokens: Tokens, features: GridFeatures) -> Any:
        """As of any family; to safety tokens DeepStack adds zeros."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        laid = super().visual(tokens, features).pooler_output
        layers: Any = []
        for rows in features.extra.values():
            pairs = zip(laid, rows.split(), strict=True)
            layers.append([torch.cat([own.new_zeros(len(all_) - len(own), own.shape[1]), own]) for all_, own in pairs])
        return BaseModelOutputWithDeepstackFeatures(pooler_output=laid, deepstack_features=layers)
