"""What the image processor does to a picture, taken apart: 8-bit pixels at the tower's size, then scaled values."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from psa_fast.data.chat import prepare_images


class Frame:
    """The pictures of one processor, between its resizing and its normalising.

    Attributes:
        size: (H, W) of what the tower sees.

    Raises ValueError for a processor that does anything else to a picture of that size than to scale and normalise it.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        images = processor.image_processor
        factor = float(images.rescale_factor) if getattr(images, "do_rescale", True) else 1.0
        normalised = getattr(images, "do_normalize", True)
        mean = torch.tensor(images.image_mean if normalised else [0.0] * 3, dtype=torch.float64)
        std = torch.tensor(images.image_std if normalised else [1.0] * 3, dtype=torch.float64)
        # values = pixels in 0..1 * scale + shift
        self._scale, self._shift = (255.0 * factor / std).view(3, 1, 1), (-mean / std).view(3, 1, 1)
        blank = _pixels([Image.new("RGB", (64, 64))], processor)
        if blank.dim() != 4 or blank.shape[:2] != (1, 3):
            raise ValueError(f"the image processor makes {list(blank.shape)} of one picture; expected [1, 3, H, W]")
        self.size: tuple[int, int] = blank.shape[2], blank.shape[3]
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(0, 256, (3, *self.size), generator=generator, dtype=torch.uint8)
        given = prepare_images([self.pil(probe)], processor)
        pixels = given.pixel_values
        assert isinstance(pixels, Tensor)
        step = (self._scale / 255).abs().min().item()
        if pixels.shape != blank.shape or (pixels[0] - self.values(probe / 255)).abs().max() > 0.01 * step:
            raise ValueError(
                f"{type(images).__name__} does not keep a picture of {self.size[1]} x {self.size[0]} pixels as it is: "
                "attacked pixels would not be those that the guard sees"
            )
        self._placeholder = given.placeholders[0]

    def values(self, pixels: Tensor) -> Tensor:
        """Pixels float [..., 3, H, W] in 0..1 -> what the tower takes; differentiable."""
        scale, shift = (each.to(pixels.device, pixels.dtype) for each in (self._scale, self._shift))
        return pixels * scale + shift

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> uint8 [n, 3, H, W], by the processor's own resizing and cropping."""
        values = _pixels(images, self.processor).double()
        pixels = (values - self._shift) / self._scale * 255
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def placeholders(self, count: int) -> tuple[str, ...]:
        """The placeholder text of each of `count` pictures."""
        return (self._placeholder,) * count

    def pil(self, picture: Tensor) -> Image.Image:
        """uint8 [3, H, W] -> a PIL image."""
        return Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())

    def png(self, picture: Tensor) -> bytes:
        """uint8 [3, H, W] -> the bytes of a PNG file, which loses nothing."""
        stream = io.BytesIO()
        self.pil(picture).save(stream, format="PNG")
        return stream.getvalue()


def _pixels(images: Sequence[Image.Image], processor: Any) -> Tensor:
    """[n, 3, H, W]. Raises ValueError for a processor that cuts pictures into patches of its own."""
    pixels = prepare_images(images, processor).pixel_values
    if not isinstance(pixels, Tensor):
        raise ValueError("pixel attacks need images that are all alike, and this model's are of different sizes")
    return pixels
