"""Concept attention: nn.MultiheadAttention over [safety tokens ; features], without projecting the keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psa_fast.ops import attention_pool


class ConceptAttention(nn.Module):
    """Equal to `nn.MultiheadAttention(embed_dim, num_heads)` with keys = values = [tokens ; features].

    Value and every gradient agree in fp64, and the state_dicts are interchangeable. No residual, no norm, no dropout.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, device=device, dtype=dtype))
        self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.MultiheadAttention does; call it after a meta-device build."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, safety_tokens: Tensor, features: Tensor, features_mask: Tensor | None = None
    ) -> Tensor:
        """query [B, Q, E], safety_tokens [S0, E], features [B, S1, E], features_mask bool [B, S1] -> [B, Q, E]."""
        pooled = attention_pool(
            query,
            features,
            self.in_proj_weight,
            self.in_proj_bias,
            self.num_heads,
            tokens=safety_tokens,
            features_mask=features_mask,
        )
        return self.out_proj(pooled)
