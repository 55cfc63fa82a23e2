"""InternVL in transformers' own format: an image is cut into tiles of one size, with a small copy of the whole behind.

h_o is taken on the language model's grid: the patches that the pixel shuffle lays side by side, [cells, 4 Dv'], tile by
tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from psa_fast.models.families.family import Family
from psa_fast.models.image_features import GridFeatures, Ragged
from psa_fast.pictures import Grid, Images, Pictures


class InternVLFamily(Family):
    """Adapter for transformers' InternVLForConditionalGeneration."""

    module_names = {  # noqa: RUF012
        "vision": "model.vision_tower",
        "connector": "model.multi_modal_projector",
        "language": "model.language_model",
        "lm_head": "lm_head",
    }
    one_tensor = True

    @property
    def vision_hidden_size(self) -> int:
        """Dv: as many patches side by side as become one token."""
        return self.config.vision_config.hidden_size * self._shuffled**2

    @property
    def _shuffled(self) -> int:
        return round(1 / self.config.downsample_ratio)

    @property
    def _tile(self) -> Grid:
        """Cells of a tile."""
        vision = self.config.vision_config
        (height, width), (down, right) = vision.image_size, vision.patch_size
        return height // down // self._shuffled, width // right // self._shuffled

    def image_tokens(self, config: Any | None = None) -> None:
        """None: as many as the image has tiles."""
        return None

    def blank_image(self, device: torch.device) -> Pictures:
        """One tile of zeros."""
        vision = self.config.vision_config
        return self._pictures(torch.zeros(1, vision.num_channels, *vision.image_size, device=device), [1])

    def around(self, tokenizer: Any) -> tuple[str, str]:
        """<img> and </img>."""
        found = [getattr(tokenizer, name, None) for name in ("start_image_token", "end_image_token")]
        if None in found:
            raise ValueError("the base's tokenizer names no start_image_token and end_image_token, as InternVL's does")
        return cast(tuple[str, str], tuple(found))

    def prepare(self, images: Sequence[Any], image_processor: Any) -> Pictures:
        """Tiles of PIL images, row by row, the small copy last; as the base's own processor, which always cuts."""
        processed = image_processor(images=list(images), crop_to_patches=True, return_tensors="pt")
        pixels, wanted = processed["pixel_values"], tuple(self.config.vision_config.image_size)
        if pixels.shape[-2:] != wanted:
            raise ValueError(f"the image processor makes tiles of {tuple(pixels.shape[-2:])}, the model takes {wanted}")
        return self._pictures(pixels, [int(tiles) for tiles in processed["num_patches"]])

    def count(self, size: tuple[int, int], image_processor: Any) -> int:
        """Cells of its tiles."""
        width, height = size
        tiles = image_processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        return tiles * self._tile[0] * self._tile[1]

    def _pictures(self, pixels: Tensor, tiles: list[int]) -> Pictures:
        h, w = self._tile
        grids = [[(h, w)] * count for count in tiles]
        return Pictures({"pixel_values": pixels}, {"pixel_values": tiles}, grids, [h * w * count for count in tiles])

    def vision_features(self, vlm: nn.Module, images: Images) -> GridFeatures:
        """h_o, [cells, Dv]; without a graph, as nothing below the connector is trained."""
        images, tower = self.taken(images), self.module(vlm, "vision")
        pixels = images.tensors["pixel_values"].to(next(tower.parameters()).dtype)
        layer, (h, w) = self.config.vision_feature_layer, self._tile
        with torch.no_grad():
            output = tower(pixel_values=pixels, output_hidden_states=layer != -1, return_dict=True)
            patches = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
            if self.config.vision_feature_select_strategy == "default":
                patches = patches[:, 1:]
            patches = patches.reshape(len(pixels), h * self._shuffled, w * self._shuffled, -1)
            cells = cast(Any, vlm).model.pixel_shuffle(patches, scale_factor=self.config.downsample_ratio)
        vision = Ragged(cells.reshape(-1, self.vision_hidden_size), list(images.tokens))
        return GridFeatures(vision, images.grids)

    def project(self, vlm: nn.Module, vision: GridFeatures) -> GridFeatures:
        """The connector, of all tiles at once."""
        projected = self.module(vlm, "connector")(vision.vision.values)
        return replace(vision, projected=Ragged(projected, vision.vision.sizes))
