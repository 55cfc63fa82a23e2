"""Idefics3 and SmolVLM: an image is cut into numbered tiles of one size, a small copy of the whole comes last.

h_o is taken on the language model's grid: the patches that the pixel shuffle lays side by side, tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn

from psa_fast.models.families.family import Family
from psa_fast.models.image_features import GridFeatures, Ragged
from psa_fast.pictures import Grid, Images, Pictures

_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"  # the stock processor has them as constants too
_LONGEST = 4096  # above it the stock processor resizes twice


class Idefics3Family(Family):
    """Adapter for transformers' Idefics3ForConditionalGeneration and SmolVLMForConditionalGeneration."""

    module_names = {  # noqa: RUF012
        "vision": "model.vision_model",
        "connector": "model.connector",
        "language": "model.text_model",
        "lm_head": "lm_head",
    }

    @property
    def vision_hidden_size(self) -> int:
        """Dv: as many patches side by side as become one token."""
        return self.config.vision_config.hidden_size * self.config.scale_factor**2

    @property
    def _side(self) -> int:
        """Cells of a tile's rows, and of its columns."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // self.config.scale_factor

    def image_tokens(self, config: Any | None = None) -> None:
        """None: as many as the image has tiles."""
        return None

    def blank_image(self, device: torch.device) -> Pictures:
        """One tile of zeros."""
        vision = self.config.vision_config
        side = vision.image_size
        return self._pictures(torch.zeros(1, 1, vision.num_channels, side, side, device=device), [1])

    def expansion(self, placeholder: str, safety_tokens: int, tokens: int, tiles: Grid | None) -> str:
        """Each tile's number, the tiles row by row, and the copy."""
        rows, columns = tiles or (0, 0)
        own = placeholder * (tokens // (rows * columns + 1))
        names = [f"<row_{r + 1}_col_{c + 1}>" for r in range(rows) for c in range(columns)] + [_WHOLE]
        texts = [_AROUND + name + own for name in names]
        texts[0] = _AROUND + names[0] + placeholder * safety_tokens + own
        lines = ["".join(texts[r * columns : (r + 1) * columns]) + "\n" for r in range(rows)]
        return "".join(lines) + "\n" * bool(rows) + texts[-1] + _AROUND

    def tiles(self, size: tuple[int, int], image_processor: Any) -> Grid:
        """Rows and columns after the stock processor's two resizings, (0, 0) for the copy alone.

        Its own count (`get_number_of_image_patches`, transformers 5.23) leaves out that the second keeps the shape.
        """
        if not image_processor.do_image_splitting:
            return 0, 0
        longest, side = image_processor.size["longest_edge"], image_processor.max_image_size["longest_edge"]
        if not image_processor.do_resize or longest > _LONGEST:
            raise ValueError(
                f"the image processor must resize, to a size.longest_edge of at most {_LONGEST}, not {longest}"
            )
        width, height = size
        shape = width / height
        if width >= height:
            width, height = longest, int(longest / shape)
            height += height % 2
        else:
            width, height = int(longest * shape), longest
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        shape = width / height
        if width >= height:
            width = ceil(width / side)
            height = ceil(int(width * side / shape) / side)
        else:
            height = ceil(height / side)
            width = ceil(int(height * side * shape) / side)
        return (height, width) if max(width, height) > 1 else (0, 0)

    def prepare(self, images: Sequence[Any], image_processor: Any) -> Pictures:
        """Tiles of PIL images, row by row, the small copy last."""
        nested = [[image] for image in images]
        done = image_processor(images=nested, do_pad=True, return_row_col_info=True, return_tensors="pt")
        pixels, side = done["pixel_values"], self.config.vision_config.image_size
        if pixels.shape[-2:] != (side, side):
            raise ValueError(f"the image processor makes tiles of {tuple(pixels.shape[-2:])}, the model takes {side}")
        counts = [int(rows[0]) * int(columns[0]) + 1 for rows, columns in zip(done["rows"], done["cols"], strict=True)]
        tiles = [own[:count] for own, count in zip(pixels, counts, strict=True)]  # the rest is padding
        return self._pictures(torch.cat(tiles).unsqueeze(1), counts)

    def count(self, size: tuple[int, int], image_processor: Any) -> int:
        """Cells of its tiles."""
        rows, columns = self.tiles(size, image_processor)
        return (rows * columns + 1) * self._side**2

    def _pictures(self, pixels: Tensor, tiles: list[int]) -> Pictures:
        """Of pixels [tiles, 1, 3, H, W], as the model would take each tile as a row of a batch."""
        side = self._side
        grids = [[(side, side)] * count for count in tiles]
        return Pictures({"pixel_values": pixels}, {"pixel_values": tiles}, grids, [side**2 * count for count in tiles])

    def vision_features(self, vlm: nn.Module, images: Images) -> GridFeatures:
        """h_o, [cells, Dv]; without a graph, as nothing below the connector is trained."""
        images, tower = self.taken(images), self.module(vlm, "vision")
        pixels = images.tensors["pixel_values"].flatten(0, 1).to(next(tower.parameters()).dtype)
        with torch.no_grad():
            patches = tower(pixel_values=pixels, return_dict=True).last_hidden_state
            cells = cast(Any, self.module(vlm, "connector")).pixel_shuffle(patches, self.config.scale_factor)
        vision = Ragged(cells.reshape(-1, self.vision_hidden_size), list(images.tokens))
        return GridFeatures(vision, images.grids)

    def project(self, vlm: nn.Module, vision: GridFeatures) -> GridFeatures:
        """The connector behind its pixel shuffle, of all tiles at once."""
        projected = cast(Any, self.module(vlm, "connector")).modality_projection(vision.vision.values)
        return replace(vision, projected=Ragged(projected, vision.vision.sizes))
