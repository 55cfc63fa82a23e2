"""What the launchers return, apart from them: importing it needs no Triton, so that plain torch can return the same."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pooled(NamedTuple):
    """token_sum and feature_sum [B, R, E], mass [B, R]; for backward scores [B, R, S0 + S1] and lse [B, R] (base e).

    mass, scores and lse are fp32 at least.
    """

    token_sum: Tensor
    feature_sum: Tensor
    mass: Tensor
    scores: Tensor
    lse: Tensor


class PoolGrads(NamedTuple):
    """Gradients of tokens, features, token_query, feature_query, feature_offset [B, R], feature_bias (None without)."""

    tokens: Tensor
    features: Tensor
    token_query: Tensor
    feature_query: Tensor
    feature_offset: Tensor
    feature_bias: Tensor | None
