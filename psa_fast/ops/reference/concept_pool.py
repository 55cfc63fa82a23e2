"""The specification of concept_pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_pool(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_offset: Tensor | None = None,
    *,
    feature_bias: Tensor | None = None,
    activation: str | None = None,
    features_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool shared tokens and a sample's own features with the weights of one softmax.

    This is the specification of `psa_fast.ops.concept_pool`, which tests, benchmarks and docs go by. The tokens are
    [S0, E] and the features [B, S1, E]; both queries are [B, R, E], `feature_offset` is [B, R], `feature_bias` is [E]
    and `features_mask` is bool [B, S1], True where a feature takes part. `activation` is "silu" or None. With
    x = act(features + feature_bias), each of the R rows of a sample has the scores and weights

        s = [token_query . tokens ; feature_query . x + feature_offset]      p = [p_0 ; p_1] = softmax(s)

    and the function returns token_sum = p_0 tokens [B, R, E], feature_sum = p_1 x [B, R, E] and mass = sum(p_1) [B, R].
    """
    x = features if feature_bias is None else features + feature_bias
    x = F.silu(x) if activation == "silu" else x

    token_scores = token_query @ tokens.t()  # [B, R, S0]
    feature_scores = feature_query @ x.transpose(1, 2)  # [B, R, S1]
    if feature_offset is not None:
        feature_scores = feature_scores + feature_offset.unsqueeze(-1)
    if features_mask is not None:
        feature_scores = feature_scores.masked_fill(~features_mask.unsqueeze(1), float("-inf"))

    p = torch.softmax(torch.cat([token_scores, feature_scores], -1), -1)
    p0, p1 = p.split([tokens.shape[0], features.shape[1]], -1)
    return p0 @ tokens, p1 @ x, p1.sum(-1)
