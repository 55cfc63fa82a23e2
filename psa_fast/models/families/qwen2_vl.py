"""Qwen2-VL: images of any size, a connector that merges 2 x 2 patches, rotary positions in 2-D.

h_o is taken on the language model's grid: the patches that the connector merges, side by side, [cells, 4 Dv'].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from psa_fast.models.families.family import Family
from psa_fast.models.image_features import GridFeatures, Ragged
from psa_fast.models.transfer import to_device
from psa_fast.pictures import Grid, Images, Pictures


class Qwen2VLFamily(Family):
    """Adapter for transformers' Qwen2VLForConditionalGeneration, and what its successors share with it."""

    # the connector lies inside the tower
    module_names = {  # noqa: RUF012
        "vision": "model.visual",
        "connector": "model.visual.merger",
        "language": "model.language_model",
        "lm_head": "lm_head",
    }

    @property
    def _merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    @property
    def _patch_width(self) -> int:
        """Width of the tower's own patches."""
        return self.config.vision_config.embed_dim

    @property
    def vision_hidden_size(self) -> int:
        """Dv: merge x merge patches side by side."""
        return self._patch_width * self._merge**2

    def image_tokens(self, config: Any | None = None) -> None:
        """None: as the image's size is."""
        return None

    def blank_image(self, device: torch.device) -> Pictures:
        """Zeros of 2 x 2 cells."""
        vision, side = self.config.vision_config, 2 * self._merge
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(side * side, values, device=device)
        return self._pictures(pixels, torch.tensor([[1, side, side]]).to(device), [(side, side)])

    def prepare(self, images: Sequence[Any], image_processor: Any) -> Pictures:
        """Patches of PIL images, merge x merge block by block as the processor lays them."""
        processed = image_processor(images=list(images), return_tensors="pt")
        sizes = [(h, w) for _, h, w in processed["image_grid_thw"].tolist()]
        return self._pictures(processed["pixel_values"], processed["image_grid_thw"], sizes)

    def count(self, size: tuple[int, int], image_processor: Any) -> int:
        """Cells after the processor's resizing."""
        width, height = size
        return image_processor.get_number_of_image_patches(height, width) // self._merge**2

    def _pictures(self, pixels: Tensor, shapes: Tensor, patches: Sequence[Grid]) -> Pictures:
        grids = [[(h // self._merge, w // self._merge)] for h, w in patches]
        return Pictures(
            tensors={"pixel_values": pixels, "image_grid_thw": shapes},
            rows={"pixel_values": [h * w for h, w in patches], "image_grid_thw": [1] * len(patches)},
            grids=grids,
            tokens=[h * w for ((h, w),) in grids],
        )

    def vision_features(self, vlm: nn.Module, images: Images) -> GridFeatures:
        """h_o, [cells, Dv] row by row; without a graph, as nothing below the connector is trained."""
        images, tower = self.taken(images), self.module(vlm, "vision")
        pixels = images.tensors["pixel_values"].to(next(tower.parameters()).dtype)
        with torch.no_grad():
            output = tower(pixels, grid_thw=images.tensors["image_grid_thw"], return_dict=True)
        cells = output.last_hidden_state.reshape(-1, self.vision_hidden_size)
        order = self.tower_order([grid for grids in images.grids for grid in grids])
        if order is not None:
            cells = cells.index_select(0, to_device(order.argsort().tolist(), cells.device))
        vision = Ragged(cells, list(images.tokens))
        return GridFeatures(vision, images.grids, extra=self.extra_features(output, vision.sizes))

    def extra_features(self, output: Any, sizes: list[int]) -> dict[str, Ragged]:
        """What the language model needs of the tower's output beside h_i."""
        return {}

    def tower_order(self, grids: Sequence[Grid]) -> Tensor | None:
        """Cells of the images in the order in which the tower lays them, int64 [cells]; None: row by row."""
        return None

    def project(self, vlm: nn.Module, vision: GridFeatures) -> GridFeatures:
        """The merger, outside the tower's pass, so that it can be trained."""
        projected = self.module(vlm, "connector")(vision.vision.values.reshape(-1, self._patch_width))
        return replace(vision, projected=Ragged(projected, vision.vision.sizes))

    def positions(self, input_ids: Sequence[int], safety_tokens: int, grids: Sequence[Sequence[Grid]]) -> Tensor:
        """[4, T]: places in the row; time, height and width. Safety tokens count like text, in front of the grid."""
        found: list[Tensor] = []
        place = start = 0
        images = iter(grids)
        ids = list(input_ids)
        while place < len(ids):
            if ids[place] == self.image_token_id:
                ((h, w),) = next(images)
                before = torch.arange(start, start + safety_tokens)
                start += safety_tokens
                row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
                grid = torch.stack([torch.zeros_like(row), row, column]) + start
                found += [before.expand(3, -1), grid]
                place += safety_tokens + h * w
                start += max(h, w)
            else:
                text = place
                while place < len(ids) and ids[place] != self.image_token_id:
                    place += 1
                found.append(torch.arange(start, start + place - text).expand(3, -1))
                start += place - text
        axes = torch.cat(found, 1) if found else torch.zeros(3, 0, dtype=torch.int64)
        return torch.cat([torch.arange(axes.shape[1]).unsqueeze(0), axes])
