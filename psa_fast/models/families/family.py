"""What psa-fast asks of a VLM family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ImageFeatures(NamedTuple):
    """One vision pass: vision = h_o [N, S, Dv], projected = h_i [N, S, E] (arXiv 2411.11543, section 3)."""

    vision: Tensor
    projected: Tensor


class Family(ABC):
    """Adapter of one family; stateless but for the config, the model is an argument."""

    #: dotted names inside the VLM: vision, connector, language, lm_head
    module_names: dict[str, str]

    def __init__(self, config: Any):
        self.config = config

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """Id of the image placeholder."""

    @property
    @abstractmethod
    def vision_hidden_size(self) -> int:
        """Dv, width of the vision features."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """E, width of the language model."""

    @abstractmethod
    def image_tokens(self, config: Any | None = None) -> int:
        """S, tokens of one image."""

    @abstractmethod
    def without_language_layers(self, config: Any) -> Any:
        """A copy of the base's config whose language model has no decoder layer; its embeddings and head stay."""

    @abstractmethod
    def vision_choices(self) -> dict[str, Any]:
        """JSON values that decide, beside the tower's weights, what `vision_features` returns."""

    @abstractmethod
    def vision_run(self) -> tuple[int, int]:
        """Encoder layers that `vision_features` runs, and an image's positions in them."""

    @abstractmethod
    def blank_image(self, device: torch.device) -> Tensor:
        """One image of zeros [1, 3, H, W], which keeps a rank without images in step with the others."""

    @abstractmethod
    def vision_features(self, vlm: nn.Module, pixel_values: Tensor) -> Tensor:
        """h_o [N, S, Dv] of [N, 3, H, W]."""

    @abstractmethod
    def features_of_tower(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """`vision_features` of a tower like the model's own that stands by itself."""

    def encode_images(self, vlm: nn.Module, pixel_values: Tensor) -> ImageFeatures:
        """One vision pass over [N, 3, H, W]."""
        vision = self.vision_features(vlm, pixel_values)
        return ImageFeatures(vision, self.project(vlm, vision))

    def project(self, vlm: nn.Module, vision: Tensor) -> Tensor:
        """The VLM's own projector: h_o [N, S, Dv] -> h_i [N, S, E]."""
        return self.module(vlm, "connector")(vision)

    @abstractmethod
    def embed(self, vlm: nn.Module, input_ids: Tensor) -> Tensor:
        """Word embeddings [B, T, E]."""

    @abstractmethod
    def hidden_states(
        self,
        vlm: nn.Module,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **attention_kwargs: Any,
    ) -> Tensor:
        """Last hidden states [B, T, E] of the language model, without a cache; attention_kwargs reach the attention."""

    @abstractmethod
    def generate(self, vlm: nn.Module, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """New ids only, [B, t]."""

    @abstractmethod
    def extend_processor(self, processor: Any, num_safety_tokens: int) -> Any:
        """Make every image expand to num_safety_tokens + S placeholders. Calling it twice changes nothing."""

    def module(self, vlm: nn.Module, part: str) -> nn.Module:
        """The module of one part: vision, connector, language or lm_head."""
        return vlm.get_submodule(self.module_names[part])
