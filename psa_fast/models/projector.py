"""The safety projector: Honeybee's C-Abstractor (arXiv 2312.06742), in channels-last.

RegStage -> AdaptiveAvgPool2d to the query grid (here the input grid: an identity) -> RegStage -> Linear, SiLU, Linear.
The last bias, SiLU and Linear belong to the attention that absorbs them (attention.ConceptReadout).
A RegStage block is RegNet's bottleneck as timm builds it with bottle_ratio 1, group size 1, se_ratio 0.25 and LayerNorm
over channels: every 1x1 convolution is a Linear here, every norm a plain LayerNorm on the last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psa_fast.models.grids import Box, Grid

# the official network's: timm's ConvNormAct makes LayerNormAct2d of the LayerNorm2d it is given, which has this default
LAYER_NORM_EPS = 1e-5


class SqueezeExcite(nn.Module):
    """Channel gate from the mean over the grid; reduced width as timm: a quarter of the block's input channels."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, reduced)
        self.fc2 = nn.Linear(reduced, channels)

    def forward(self, x: Tensor, box: Box) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C]."""
        gate = self.fc2(F.silu(self.fc1(box.mean(x))))
        return x * torch.sigmoid(gate)[:, None, None, :]


class DepthwiseConv3x3(nn.Conv2d):
    """3x3 convolution of every channel by itself on [N, H, W, C]."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C]; the permutes are views of a channels-last tensor."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RegBlock(nn.Module):
    """1x1, depthwise 3x3, squeeze-excite, 1x1; norm after every convolution, SiLU after all but the last; residual."""

    def __init__(self, in_channels: int, channels: int, eps: float = LAYER_NORM_EPS):
        super().__init__()
        self.conv1 = nn.Linear(in_channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.conv2 = DepthwiseConv3x3(channels)
        self.norm2 = nn.LayerNorm(channels, eps=eps)
        self.se = SqueezeExcite(channels, max(1, round(in_channels * 0.25)))
        self.conv3 = nn.Linear(channels, channels, bias=False)
        self.norm3 = nn.LayerNorm(channels, eps=eps)
        self.downsample: nn.Module = nn.Identity()
        if in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Linear(in_channels, channels, bias=False), nn.LayerNorm(channels, eps=eps)
            )

    def forward(self, x: Tensor, box: Box) -> Tensor:
        """[N, H, W, in_channels] -> [N, H, W, channels]; what lies outside the grids changes no cell of them."""
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.se(F.silu(self.norm2(self.conv2(box.clear(y)))), box)
        return F.silu(self.norm3(self.conv3(y)) + self.downsample(x))


class RegStage(nn.ModuleList):
    """Blocks one after the other, all on the grids of one box."""

    def __init__(self, in_channels: int, channels: int, depth: int, eps: float = LAYER_NORM_EPS):
        super().__init__(RegBlock(in_channels if i == 0 else channels, channels, eps) for i in range(depth))

    def forward(self, x: Tensor, box: Box) -> Tensor:
        """[N, H, W, in_channels] -> [N, H, W, channels]."""
        for block in self:
            x = block(x, box)
        return x


class SafetyProjector(nn.Module):
    """g(h_o) up to its last activation: vision features to the language model's width, on the same grid.

    Args:
        vision_hidden_size: Dv.
        hidden_size: E.
        width: channels inside the stages.
        depth: blocks in each of the two stages.
        eps: of every norm.
    """

    def __init__(
        self, vision_hidden_size: int, hidden_size: int, width: int, depth: int = 3, eps: float = LAYER_NORM_EPS
    ):
        super().__init__()
        self.stage1 = RegStage(vision_hidden_size, width, depth, eps)
        self.stage2 = RegStage(width, width, depth, eps)
        self.expand = nn.Linear(width, hidden_size, bias=False)

    def forward(self, features: Tensor, grids: Sequence[Grid] | None = None) -> Tensor:
        """g(h_o), before bias and SiLU.

        Args:
            features: [N, S, Dv], S a square grid; with `grids`, flat: [cells, Dv], grid after grid, row by row.
            grids: height and width of each grid. Every grid comes out as it does alone.

        Returns:
            [N, S, E]; with `grids`, [cells, E].

        Raises:
            ValueError: S is not a square, or the grids have other cells than the features.
        """
        if grids is None:
            n, s, width = features.shape
            side = isqrt(s)
            if side * side != s:
                raise ValueError(f"the safety projector needs a square grid of features, got {s}")
            box, laid = Box([(side, side)]), features.reshape(n, side, side, width)  # all alike: one speaks for all
            x = self.stage2(self.stage1(laid, box), box)
            return self.expand(x.reshape(n, s, x.shape[-1]))
        box = Box(grids, features.device)
        x = self.stage2(self.stage1(box.lay(features), box), box)
        return self.expand(box.take(x))
