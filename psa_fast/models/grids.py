"""Grids of different heights and widths in one batch: laid into a common box, with a mask of the cells they fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psa_fast.pictures import Grid


class Box:
    """Where the cells of `grids` lie in a box [N, H, W] as high and wide as the highest and widest of them.

    One box rather than a batch for every shape: each rank then runs each module once, which ZeRO-3 needs.

    Args:
        grids: height and width of each grid, as Python integers: nothing is read back from the device.
        device: where the features are.

    Raises:
        ValueError: no grid, or one without a cell.
    """

    def __init__(self, grids: Sequence[Grid], device: torch.device | str = "cpu"):
        if not grids or min(min(grid) for grid in grids) < 1:
            raise ValueError(f"expected grids of at least one cell each, got {list(grids)}")
        self.cells = sum(h * w for h, w in grids)
        self.shape = (len(grids), max(h for h, _ in grids), max(w for _, w in grids))
        #: bool [N, H, W, 1], True = a cell of the grid; None: every grid fills the box
        self.mask: Tensor | None = None
        #: fp32 [N, 1], cells of each grid
        self.counts: Tensor | None = None
        self._places: Tensor | None = None  # int64 [cells], each cell's place in the flattened box
        if len(set(grids)) > 1:
            heights, widths = torch.tensor(grids).T[..., None]
            rows, columns = torch.arange(self.shape[1]) < heights, torch.arange(self.shape[2]) < widths
            mask = rows[:, :, None] & columns[:, None, :]
            self._places = mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)
            self.mask = mask[..., None].to(device, non_blocking=True)
            self.counts = (heights * widths).float().to(device, non_blocking=True)

    def lay(self, features: Tensor) -> Tensor:
        """[cells, C], grid after grid, row by row -> [N, H, W, C], zeros outside. ValueError for other counts."""
        if features.dim() != 2 or features.shape[0] != self.cells:
            raise ValueError(f"the grids have {self.cells} cells, the features are {list(features.shape)}")
        n, h, w = self.shape
        if self._places is not None:
            features = features.new_zeros(n * h * w, features.shape[1]).index_copy(0, self._places, features)
        return features.reshape(n, h, w, -1)

    def take(self, laid: Tensor) -> Tensor:
        """The inverse: [N, H, W, C] -> [cells, C]; what lies outside the grids is dropped."""
        flat = laid.reshape(-1, laid.shape[-1])
        return flat if self._places is None else flat.index_select(0, self._places)

    def clear(self, laid: Tensor) -> Tensor:
        """[N, H, W, C] with zeros outside the grids, as a convolution's padding has them."""
        return laid if self.mask is None else laid.masked_fill(~self.mask, 0.0)

    def mean(self, laid: Tensor) -> Tensor:
        """Mean over each grid's own cells: [N, H, W, C] -> [N, C]."""
        if self.counts is None:
            return laid.mean(dim=(1, 2))
        total = self.clear(laid).sum(dim=(1, 2), dtype=torch.promote_types(laid.dtype, torch.float32))
        return (total / self.counts).to(laid.dtype)
