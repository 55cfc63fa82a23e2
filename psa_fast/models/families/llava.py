"""LLaVA-1.5: a CLIP (or SigLIP) tower, a two-layer connector, a causal language model."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from psa_fast.models.families.family import Family

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

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`."""
        return self.config.image_token_id

    @property
    def vision_hidden_size(self) -> int:
        """Dv; several feature layers are concatenated."""
        layers = self.config.vision_feature_layer
        return self.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    @property
    def hidden_size(self) -> int:
        """E."""
        return self.config.text_config.hidden_size

    def image_tokens(self, config: Any | None = None) -> int:
        """S: patches, plus the class token, minus the position the "default" strategy drops."""
        config = self.config if config is None else config
        vision = config.vision_config
        dropped = config.vision_feature_select_strategy == "default"
        return (vision.image_size // vision.patch_size) ** 2 + _class_tokens(config) - dropped

    def without_language_layers(self, config: Any) -> Any:
        """num_hidden_layers 0 in the text config."""
        config = copy.deepcopy(config)
        config.text_config.num_hidden_layers = 0
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = []
        return config

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

    def vision_features(self, vlm: nn.Module, pixel_values: Tensor) -> Tensor:
        """One vision pass: only up to the layer that is used.

        Without a graph where nothing could use it: the tower is frozen and the pixels do not require a gradient.
        """
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

    def embed(self, vlm: nn.Module, input_ids: Tensor) -> Tensor:
        """Word embeddings; placeholders are embedded too and overwritten later."""
        return vlm.get_input_embeddings()(input_ids)  # type: ignore[operator]

    def hidden_states(
        self,
        vlm: nn.Module,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **attention_kwargs: Any,
    ) -> Tensor:
        """Last hidden states, final norm included, use_cache off."""
        body: Any = vlm.model
        return body(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,  # with a cache transformers builds no mask from packed position ids: samples would leak
            **attention_kwargs,
        ).last_hidden_state

    def generate(self, vlm: nn.Module, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """transformers' generate from embeddings, which returns new ids only."""
        model: Any = vlm
        return model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def extend_processor(self, processor: Any, num_safety_tokens: int) -> Any:
        """Set the processor from the model's config, so that its class default (off by one for CLIP) never matters."""
        processor.patch_size = self.config.vision_config.patch_size
        processor.vision_feature_select_strategy = self.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = num_safety_tokens + _class_tokens(self.config)
        return processor


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
