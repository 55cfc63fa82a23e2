"""Learned tokens, owned by a module of their own so that ZeRO-3 gathers them like any other weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SafetyTokens(nn.Module):
    """n learned vectors of width E, drawn from N(0, std), of 0.02 as in the paper (arXiv 2411.11543, section 3.2)."""

    def __init__(
        self,
        n: int,
        embed_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        std: float = 0.02,
    ):
        super().__init__()
        self.std, self.count = std, n
        self.weight = nn.Parameter(torch.empty(n, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tokens again; call it after a meta-device build."""
        if self.weight.numel():
            nn.init.normal_(self.weight, std=self.std)

    def forward(self, batch: int) -> Tensor:
        """[batch, n, E], expanded (stride 0), never copied."""
        return self.weight.unsqueeze(0).expand(batch, -1, -1)
