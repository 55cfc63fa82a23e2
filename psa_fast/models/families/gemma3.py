"""Gemma-3: images all of one size, pooled by the connector; an image's tokens see one another.

h_o is taken on the language model's grid: the tower's patches pooled as the connector pools them, [cells, Dv].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psa_fast.models.families.family import Family, Rows, Tokens
from psa_fast.models.image_features import GridFeatures, Ragged
from psa_fast.models.transfer import to_device
from psa_fast.pictures import Images, Pictures

#: name in GridFeatures.extra of what the connector takes: the tower's patches
_PATCHES = "patches"


class Gemma3Family(Family):
    """Adapter for transformers' Gemma3ForConditionalGeneration; no "pan and scan" (crops as further images)."""

    module_names = {  # noqa: RUF012
        "vision": "model.vision_tower",
        "connector": "model.multi_modal_projector",
        "language": "model.language_model",
        "lm_head": "lm_head",
    }
    works = frozenset({"packing"})  # FlashAttention would drop the mask of images
    one_tensor = True

    @property
    def image_mark_id(self) -> int:
        """<start_of_image>; its placeholders are another token."""
        return self.config.boi_token_id

    @property
    def vision_hidden_size(self) -> int:
        """Dv, the tower's width."""
        return self.config.vision_config.hidden_size

    @property
    def _side(self) -> int:
        """Cells of an image's rows, and of its columns."""
        return isqrt(self.config.mm_tokens_per_image)

    def image_tokens(self, config: Any | None = None) -> None:
        """None: features are laid as grids, though all are alike."""
        return None

    def blank_image(self, device: torch.device) -> Pictures:
        """One image of zeros."""
        vision = self.config.vision_config
        return self._pictures(torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=device))

    def around(self, tokenizer: Any) -> tuple[str, str]:
        """The tokens of an image's begin and end, with an empty line on either side."""
        begin, end = tokenizer.convert_ids_to_tokens([self.config.boi_token_id, self.config.eoi_token_id])
        if None in (begin, end):
            raise ValueError("the base's tokenizer lacks the tokens that the base's config puts around an image")
        return f"\n\n{begin}", f"{end}\n\n"

    def prepare(self, images: Sequence[Any], image_processor: Any) -> Pictures:
        """PIL images, each resized as a whole."""
        processed = image_processor(images=list(images), do_pan_and_scan=False, return_tensors="pt")
        pixels, side = processed["pixel_values"], self.config.vision_config.image_size
        if pixels.shape[-2:] != (side, side):
            raise ValueError(f"the image processor resizes to {tuple(pixels.shape[-2:])}, the model takes {side, side}")
        return self._pictures(pixels)

    def count(self, size: tuple[int, int], image_processor: Any) -> int:
        """The same for all."""
        return self._side**2

    def _pictures(self, pixels: Tensor) -> Pictures:
        n, side = len(pixels), self._side
        return Pictures({"pixel_values": pixels}, {"pixel_values": [1] * n}, [[(side, side)]] * n, [side**2] * n)

    def vision_features(self, vlm: nn.Module, images: Images) -> GridFeatures:
        """h_o, [cells, Dv]; without a graph, as nothing below the connector is trained."""
        images, tower = self.taken(images), self.module(vlm, "vision")
        pixels = images.tensors["pixel_values"].to(next(tower.parameters()).dtype)
        with torch.no_grad():
            patches = tower(pixel_values=pixels, return_dict=True).last_hidden_state
            n, count, width = patches.shape
            grid = patches.transpose(1, 2).reshape(n, width, isqrt(count), isqrt(count))
            cells = F.avg_pool2d(grid, isqrt(count) // self._side).flatten(2).transpose(1, 2)
        extra = {_PATCHES: Ragged(patches.reshape(-1, width), [count] * n)}
        return GridFeatures(Ragged(cells.reshape(-1, width), list(images.tokens)), images.grids, extra=extra)

    def project(self, vlm: nn.Module, vision: GridFeatures) -> GridFeatures:
        """The connector, which pools once more: its weights are gathered in its own forward pass alone (ZeRO-3)."""
        patches = vision.extra[_PATCHES].values.reshape(vision.images, -1, self.vision_hidden_size)
        projected = self.module(vlm, "connector")(patches)
        return replace(vision, projected=Ragged(projected.flatten(0, 1), vision.vision.sizes))

    def token_types(self, input_ids: Tensor, safety_tokens: int) -> dict[str, Tensor]:
        """1 for an image's own tokens, which see one another; 0 for text, and for safety tokens: they see no image."""
        placeholders = input_ids == self.image_token_id
        place = (placeholders.cumsum(1) - 1) % (safety_tokens + self._side**2)
        return {"token_type_ids": (placeholders & (place >= safety_tokens)).int()}

    def states(
        self, vlm: nn.Module, rows: Rows, tokens: Tokens, features: Any, has_images: bool = True, **kwargs: Any
    ) -> Tensor:
        """As of any family; a packed row with masks of our own.

        transformers (seen in 5.23) looks up a window layer's images by places in the sample, not in the row.
        """
        if "sample_lengths" in kwargs:
            own = self.token_types(rows.input_ids, tokens.count)["token_type_ids"][0].bool()
            masks = self._packed_masks(own, kwargs["sample_lengths"], rows.embeds.dtype)
            rows = rows._replace(attention_mask=masks)
        return super().states(vlm, rows, tokens, features, has_images, **kwargs)

    def _packed_masks(self, own: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Of full and of window layers, [1, 1, T, T], added to the scores.

        Args:
            own: bool [T], an image's own tokens.
            lengths: tokens of each sample.
            dtype: of the scores.
        """
        place = torch.arange(len(own), device=own.device)
        sample = torch.repeat_interleave(to_device(list(lengths), own.device), output_size=len(own))
        image = torch.where(own, (own & ~F.pad(own, (1, 0))[:-1]).cumsum(0), -place - 1)  # text is alone
        seen = (place[:, None] >= place) & (sample[:, None] == sample) | (image[:, None] == image)
        near = seen & (place > place[:, None] - self.config.get_text_config().sliding_window)
        shut = torch.finfo(dtype).min
        masks = {"full_attention": seen, "sliding_attention": near}
        return {name: torch.zeros_like(m, dtype=dtype).masked_fill(~m, shut)[None, None] for name, m in masks.items()}
