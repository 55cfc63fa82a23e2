"""A base VLM without an add-on behind the surface of PsaVLM: the reference that safety is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from psa_fast.pictures import Images, Pictures


class PlainVLM(nn.Module):
    """A stock Hugging Face VLM, run by its own `generate`. Its "features" are the pixel values: it sees them once."""

    def __init__(self, vlm: nn.Module) -> None:
        super().__init__()
        self.vlm = vlm

    def encode_images(self, pixel_values: Images) -> Images:
        """Pixel values [N, 3, H, W] or Pictures as they are."""
        return pixel_values

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: Images | None,
        image_counts: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New token ids [B, t] for left-padded `input_ids` [B, T]; `features` are the pixel values of all images."""
        from psa_fast.models.batch import positions_of
        from psa_fast.models.families import get_family

        if (0 if features is None else len(features)) != int(image_counts.sum()):
            raise ValueError(f"{int(image_counts.sum())} images announced, but not as many given")
        if features is not None:  # given as None, they would be looked for all the same
            kwargs |= features.tensors if isinstance(features, Pictures) else {"pixel_values": features}
        family, grids = get_family(self.vlm), features.grids if isinstance(features, Pictures) else []
        positions = positions_of(family, 0, input_ids, grids, image_counts.tolist(), attention_mask=attention_mask)
        kwargs |= family.token_types(input_ids, 0)
        if positions is not None:
            kwargs["position_ids"] = positions
        ids = self.vlm.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[operator]
        return ids[:, input_ids.shape[1] :]
