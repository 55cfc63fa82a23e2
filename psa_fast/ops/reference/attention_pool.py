"""The specification of attention_pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_pool(
    query: Tensor,
    features: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    *,
    tokens: Tensor | None = None,
    features_mask: Tensor | None = None,
    feature_bias: Tensor | None = None,
    activation: str | None = None,
    readout_weight: Tensor | None = None,
    readout_bias: Tensor | None = None,
) -> Tensor:
    """Attend with several heads from `query` to keys = values = [tokens ; read features]; every key is projected.

    This is the specification of `psa_fast.ops.attention_pool`, which tests, benchmarks and docs go by. The query is
    [B, Q, E], the features are [B, S1, E], the tokens of every sample [S0, E]; `in_proj_weight` [3E, E] and
    `in_proj_bias` [3E] are the projections W_q, W_k, W_v stacked as in nn.MultiheadAttention. `features_mask` is bool
    [B, S1], True where a feature takes part. The features are read through SiLU and a linear map, each part only where
    it is given: `feature_bias` [E], `activation` "silu", `readout_weight` W_r [E, E] and `readout_bias` b_r [E]. With
    d = E / num_heads, the keys X and each head's slices of the projections,

        X = [tokens ; act(features + feature_bias) W_r^T + b_r]
        q = query W_q^T + b_q      k = X W_k^T + b_k      v = X W_v^T + b_v      o_h = softmax(q_h k_h^T / sqrt(d)) v_h

    and the function returns the heads' o_h side by side, [B, Q, E], as nn.MultiheadAttention has them before out_proj.
    """
    x = features if feature_bias is None else features + feature_bias
    x = F.silu(x) if activation == "silu" else x
    x = x if readout_weight is None else F.linear(x, readout_weight, readout_bias)
    keys = x if tokens is None else torch.cat([tokens.expand(x.shape[0], -1, -1), x], 1)  # [B, S, E]

    rows, weights, biases = (query, keys, keys), in_proj_weight.chunk(3), in_proj_bias.chunk(3)
    projected = [F.linear(*part) for part in zip(rows, weights, biases, strict=True)]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in projected)  # [B, H, rows, d]

    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # [B, H, Q, S]
    if features_mask is not None:
        taken = F.pad(features_mask, (keys.shape[1] - features.shape[1], 0), value=True)  # the tokens always are
        scores = scores.masked_fill(~taken[:, None, None], float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
