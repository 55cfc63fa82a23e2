"""Qwen2.5-VL: as Qwen2-VL, but most of the tower's layers attend within windows, which lie one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psa_fast.models.families.qwen2_vl import Qwen2VLFamily
from psa_fast.pictures import Grid


class Qwen25VLFamily(Qwen2VLFamily):
    """Adapter for transformers' Qwen2_5_VLForConditionalGeneration."""

    @property
    def _patch_width(self) -> int:
        return self.config.vision_config.hidden_size

    def tower_order(self, grids: Sequence[Grid]) -> Tensor:
        """Cells of the images in the order in which the tower lays them, window after window, int64 [cells]."""
        vision, first, found = self.config.vision_config, 0, []
        window = vision.window_size // self._merge // vision.patch_size
        for h, w in grids:
            row, column = torch.arange(h).unsqueeze(1), torch.arange(w)
            place = row // window * -(-w // window) + column // window
            found.append(place.flatten().argsort(stable=True) + first)
            first += h * w
        return torch.cat(found)
