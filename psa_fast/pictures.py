"""Images of different sizes between the image processor and the model: flat tensors, cut and joined image by image.

A family whose images are all alike does without: its images are the tensor [N, 3, H, W] itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class Pictures:
    """N images as the image processor left them, laid end to end. All counts are Python integers: nothing is read back.

    Attributes:
        tensors: the vision tower's inputs, flat along dimension 0 (patches, say), by the names that the model has for
            them. Those of floating point are pixels.
        rows: by the same names, each image's rows of the tensor.
        grids: of each image the grids (height, width) of its vision features.
        tokens: of each image S, its tokens in the language model, safety tokens not among them.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, list[int]]
    grids: list[list[Grid]]
    tokens: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, images: slice | Sequence[int]) -> Pictures:
        """Some of the images, in the order asked for."""
        chosen = range(len(self))[images] if isinstance(images, slice) else list(images)
        tensors = {}
        for name, tensor in self.tensors.items():
            parts = tensor.split(self.rows[name])
            tensors[name] = torch.cat([parts[i] for i in chosen]) if chosen else tensor[:0]
        return Pictures(
            tensors,
            {name: [rows[i] for i in chosen] for name, rows in self.rows.items()},
            [self.grids[i] for i in chosen],
            [self.tokens[i] for i in chosen],
        )

    @classmethod
    def join(cls, parts: Sequence[Pictures]) -> Pictures:
        """The images of several, at least one, in order."""
        names = list(parts[0].tensors)
        return cls(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in names},
            {name: [n for part in parts for n in part.rows[name]] for name in names},
            [grids for part in parts for grids in part.grids],
            [tokens for part in parts for tokens in part.tokens],
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Pictures:
        """The same images on a device, their pixels in a dtype."""
        return self._with(
            lambda x: x.to(device, dtype if x.is_floating_point() else None, non_blocking=non_blocking)  # type: ignore
        )

    def pin_memory(self) -> Pictures:
        """The same images in page-locked memory, as torch's DataLoader asks for it."""
        return self._with(lambda x: x.pin_memory())

    def _with(self, change: Any) -> Pictures:
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        return Pictures(tensors, self.rows, self.grids, self.tokens)


Images = Tensor | Pictures


def join(parts: Sequence[Images]) -> Images:
    """The images of several, all of one kind, in order."""
    if isinstance(parts[0], Pictures):
        return Pictures.join([part for part in parts if isinstance(part, Pictures)])
    return torch.cat([part for part in parts if isinstance(part, Tensor)])
