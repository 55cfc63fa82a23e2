"""Concept attention: nn.MultiheadAttention over [safety tokens ; features], without projecting the keys.

`ConceptReadout` is the same behind the last SiLU and Linear of the safety projector, which it absorbs: their parameters
are here, as ZeRO-3 gathers a parameter only for the forward of the module that owns it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
        self.reset_attention()

    def reset_attention(self) -> None:
        """Initialise as nn.MultiheadAttention does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def reset_parameters(self) -> None:
        """Initialise all parameters; call it after a meta-device build."""
        self.reset_attention()

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
            **self.absorbed(),
        )
        return self.out_proj(pooled)

    @torch.no_grad()
    def weights(self, query: Tensor, safety_tokens: Tensor, features: Tensor) -> Tensor:
        """The attention itself, which the pool never makes: [B, Q, S0 + S1], the mean of the heads; each row sums to 1.

        Arguments as for `forward`. It is for people to look at: every key is projected, and no gradient comes of it.
        """
        return self._shares_and_values(query, safety_tokens, features)[0].mean(1)

    @torch.no_grad()
    def contributions(self, query: Tensor, safety_tokens: Tensor, features: Tensor, readout: Tensor) -> Tensor:
        """What each token and feature adds to linear read-outs of the pooled output, the attention taken as it is.

        `readout` is [C, E]; returns [B, Q, C, S0 + S1], whose sums are the read-outs without the bias of `out_proj`.
        Other arguments as for `forward`, and as in `weights` no gradient comes of it.
        """
        shares, values = self._shares_and_values(query, safety_tokens, features)
        by_head = (readout @ self.out_proj.weight).unflatten(-1, (self.num_heads, -1))  # [C, H, d]
        return torch.einsum("bhqs,bhcs->bqcs", shares, torch.einsum("chd,bhsd->bhcs", by_head, values))

    def _shares_and_values(self, query: Tensor, safety_tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of every head [B, H, Q, S0 + S1], and the values it weighs [B, H, S0 + S1, d]."""
        keys = torch.cat([safety_tokens.expand(features.shape[0], -1, -1), self.read(features)], 1)
        rows = zip((query, keys, keys), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(*row).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for row in rows)
        return torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1), v

    def read(self, features: Tensor) -> Tensor:
        """What `absorbed` does to the features, done."""
        return features

    def absorbed(self) -> dict[str, Any]:
        """Options of `attention_pool` that say what is done to the features first."""
        return {}


class ConceptReadout(ConceptAttention):
    """ConceptAttention over Linear(SiLU(features + feature_bias)), which is never computed.

    `feature_bias` [E] is the bias of the Linear before the SiLU; `readout_weight` [E, E] and `readout_bias` [E] are the
    Linear after it. All start as those of nn.Linear do.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__(embed_dim, num_heads, device, dtype)
        self.feature_bias = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
        self.readout_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, device=device, dtype=dtype))
        self.readout_bias = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
        self.reset_readout()

    def reset_readout(self) -> None:
        """Initialise what comes before the attention."""
        bound = self.embed_dim**-0.5
        for parameter in (self.feature_bias, self.readout_weight, self.readout_bias):
            nn.init.uniform_(parameter, -bound, bound)

    def reset_parameters(self) -> None:
        """Initialise all parameters; call it after a meta-device build."""
        self.reset_attention()
        self.reset_readout()

    def read(self, features: Tensor) -> Tensor:
        """The SiLU and the readout, computed."""
        return F.linear(F.silu(features + self.feature_bias), self.readout_weight, self.readout_bias)

    def absorbed(self) -> dict[str, Any]:
        """The SiLU and the readout."""
        return {
            "feature_bias": self.feature_bias,
            "activation": "silu",
            "readout_weight": self.readout_weight,
            "readout_bias": self.readout_bias,
        }
