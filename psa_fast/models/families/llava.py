"""LLaVA-1.5: a CLIP (or SigLIP) tower, a two-layer connector, a causal language model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor

from psa_fast.models.families.family import PARTS, Family, Rows, Tokens
from psa_fast.models.image_features import ImageFeatures
from psa_fast.pictures import Images

#: supported vision towers, and whether they put a class token first
_CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False, "dpt": True}
_tower_lock = threading.Lock()


class LlavaFamily(Family):
    """Adapter for transformers' LlavaForConditionalGeneration."""

    module_names = {  # noqa: RUF012
        "vision": "model.vision_tower",
        "connector": "model.multi_modal_projector",
        "language": "model.language_model",
        "lm_head": "lm_head",
    }
    works = frozenset(PARTS)

    @property
    def vision_hidden_size(self) -> int:
        """Dv; several feature layers are concatenated."""
        layers = self.config.vision_feature_layer
        return self.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    def image_tokens(self, config: Any | None = None) -> int:
        """S: patches, plus the class token, minus the position the "default" strategy drops."""
        config = self.config if config is None else config
        vision = config.vision_config
        dropped = config.vision_feature_select_strategy == "default"
        return (vision.image_size // vision.patch_size) ** 2 + _class_tokens(config) - dropped

    def vision_choices(self) -> dict[str, Any]:
        """The layer that is taken, whether its class token is dropped, and the tower's own config."""
        return {
            "layer": self.config.vision_feature_layer,
            "strategy": self.config.vision_feature_select_strategy,
            "tower": json.loads(self.config.vision_config.to_json_string()),
        }

    def vision_run(self) -> tuple[int, int]:
        """Up to the used layer, patches and class token; the whole tower where it is not cut."""
        vision, wanted = self.config.vision_config, self._wanted_layers()
        cut = min(wanted) > 0
        positions = (vision.image_size // vision.patch_size) ** 2 + _class_tokens(self.config)
        return (max(wanted) if cut else vision.num_hidden_layers), positions

    def _wanted_layers(self) -> list[int]:
        """The layers used, as an index into (embeddings, layer 1, ..., layer depth)."""
        layer, depth = self.config.vision_feature_layer, self.config.vision_config.num_hidden_layers
        return [i if i >= 0 else depth + 1 + i for i in ([layer] if isinstance(layer, int) else layer)]

    def blank_image(self, device: torch.device) -> Tensor:
        """Zeros [1, C, H, W]."""
        vision = self.config.vision_config
        return torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=device)

    def encode_images(self, vlm: nn.Module, images: Images) -> ImageFeatures:
        """One vision pass over [N, 3, H, W]."""
        vision = self.vision_features(vlm, images)
        return ImageFeatures(vision, self.project(vlm, vision))

    def project(self, vlm: nn.Module, vision: Tensor) -> Tensor:
        """h_o [N, S, Dv] -> h_i [N, S, E]."""
        return self.module(vlm, "connector")(vision)

    def vision_features(self, vlm: nn.Module, images: Images) -> Tensor:
        """One vision pass: only up to the layer that is used.

        Without a graph where nothing could use it: the tower is frozen and the pixels do not require a gradient.
        """
        pixel_values = _tensor(images)
        tower = self.module(vlm, "vision")
        needed = pixel_values.requires_grad or any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needed):
            return self._select(tower, pixel_values)

    def features_of_tower(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """`vision_features` of a tower like the model's own that stands by itself."""
        return self._select(tower, pixel_values)

    def _select(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(next(tower.parameters()).dtype)  # as CLIP does by itself, and a hybrid does not
        depth, wanted = self.config.vision_config.num_hidden_layers, self._wanted_layers()
        encoder: Any = getattr(tower, "encoder", None)
        if min(wanted) > 0 and max(wanted) < depth and encoder is not None:
            with _layers_up_to(encoder, max(wanted)), _outputs_of(encoder.layers, wanted) as states:
                tower(pixel_values)
        else:  # the embeddings or the end of the tower: nothing to save
            states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        picked = [states[i] for i in wanted]
        if self.config.vision_feature_select_strategy == "default":
            picked = [x[:, 1:] for x in picked]
        return picked[0] if len(picked) == 1 else torch.cat(picked, dim=-1)

    def hidden_states(
        self,
        vlm: nn.Module,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **attention_kwargs: Any,
    ) -> Tensor:
        """Last hidden states [B, T, E], final norm included, use_cache off; attention_kwargs reach the attention."""
        body: Any = vlm.model
        return body(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,  # with a cache transformers builds no mask from packed position ids: samples would leak
            **attention_kwargs,
        ).last_hidden_state

    def states(
        self, vlm: nn.Module, rows: Rows, tokens: Tokens, features: Any, has_images: bool = True, **kwargs: Any
    ) -> Tensor:
        """From embeddings, h_i [N, S, E] put in place: no look-up and no check of the placeholders in each step."""
        embeds = self.insert_images(rows.embeds, rows.input_ids, tokens, features, has_images)
        return self.hidden_states(vlm, embeds, rows.attention_mask, rows.position_ids, **kwargs)

    def answer(self, vlm: nn.Module, rows: Rows, tokens: Tokens, features: Any | None, **kwargs: Any) -> Tensor:
        """transformers' generate from embeddings, which returns new ids only."""
        model: Any = vlm
        embeds = rows.embeds
        if features is not None:
            embeds = self.insert_images(embeds, rows.input_ids, tokens, features.projected)
        return model.generate(inputs_embeds=embeds, attention_mask=rows.attention_mask, **kwargs)

    def read_processor(self, base: str, **options: Any) -> Any:
        """AutoProcessor's."""
        return AutoProcessor.from_pretrained(base, **options)

    def extend_processor(self, processor: Any, num_safety_tokens: int) -> Any:
        """Make every image expand to num_safety_tokens + S placeholders; calling it twice changes nothing.

        All is set from the model's config, so that the processor's class default (off by one for CLIP) never matters.
        """
        processor.patch_size = self.config.vision_config.patch_size
        processor.vision_feature_select_strategy = self.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = num_safety_tokens + _class_tokens(self.config)
        return processor


def _tensor(images: Images) -> Tensor:
    if not isinstance(images, Tensor):
        raise ValueError(f"images are a {type(images).__name__}; LLaVA takes pixel values [N, 3, H, W]")
    return images


def _class_tokens(config: Any) -> int:
    tower = config.vision_config.model_type
    if tower not in _CLASS_TOKEN:
        raise ValueError(f"vision tower {tower!r} is not supported; supported: {', '.join(_CLASS_TOKEN)}")
    return int(_CLASS_TOKEN[tower])


@contextmanager
def _layers_up_to(encoder: Any, count: int) -> Iterator[None]:
    """Run the encoder with its first `count` layers only; afterwards the stock model is whole again."""
    with _tower_lock:
        layers = encoder.layers
        encoder.layers = layers[:count]
        try:
            yield
        finally:
            encoder.layers = layers


@contextmanager
def _outputs_of(layers: Any, wanted: list[int]) -> Iterator[dict[int, Tensor]]:
    """Outputs of the layers with these numbers (from 1), once they have run; no other hidden state is kept."""
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[i - 1].register_forward_hook(keep(i)) for i in wanted]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
