"""What a vision pass gives: h_o and h_i of images that are all alike, or of different sizes laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from psa_fast.models.grids import Grid


@dataclass(frozen=True)
class Ragged:
    """Rows of N images laid end to end: values [sum of sizes, width], sizes as Python integers."""

    values: Tensor
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self) -> list[Tensor]:
        """Each image's rows, [size, width]."""
        return list(self.values.split(self.sizes))

    def take(self, images: Sequence[int]) -> Ragged:
        """The rows of some images, in that order; an image may come several times."""
        parts = self.split()
        return Ragged(torch.cat([parts[i] for i in images]), [self.sizes[i] for i in images])


class ImageFeatures(NamedTuple):
    """One vision pass over images that are all alike (arXiv 2411.11543, section 3).

    vision = h_o [N, S, Dv], projected = h_i [N, S, E].
    """

    vision: Tensor
    projected: Tensor

    @property
    def images(self) -> int:
        """N."""
        return self.vision.shape[0]

    def take(self, images: Sequence[int]) -> ImageFeatures:
        """The features of some images, in that order; an image may come several times."""
        return ImageFeatures(*(tensor[list(images)] for tensor in self))


@dataclass(frozen=True)
class GridFeatures:
    """One vision pass over images of different sizes.

    Attributes:
        vision: h_o, [cells, Dv], an image's grids one after the other, each row by row.
        grids: of each image its grids (height, width).
        projected: h_i, [tokens, E]; None before the connector has run.
        extra: further features of each token, [tokens, E], by the family's names for them.
    """

    vision: Ragged
    grids: list[list[Grid]]
    projected: Ragged | None = None
    extra: dict[str, Ragged] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """N."""
        return len(self.grids)

    @property
    def flat_grids(self) -> list[Grid]:
        """The grids of all images in order."""
        return [grid for grids in self.grids for grid in grids]

    def take(self, images: Sequence[int]) -> GridFeatures:
        """The features of some images, in that order; an image may come several times."""
        return replace(
            self,
            vision=self.vision.take(images),
            grids=[self.grids[i] for i in images],
            projected=None if self.projected is None else self.projected.take(images),
            extra={name: rows.take(images) for name, rows in self.extra.items()},
        )


Features = ImageFeatures | GridFeatures
