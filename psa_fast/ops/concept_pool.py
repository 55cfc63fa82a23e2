"""The two-segment attention pool: shared tokens and per-sample features under one softmax.

x = act(features + bias)    s = [token_query . tokens ; feature_query . x + feature_offset]    p = softmax(s)
token_sum = p_0 tokens      feature_sum = p_1 x      mass = sum(p_1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psa_fast.ops.backend import Backend
from psa_fast.ops.limits import no_forward_mode, refuse_second_order, same_device
from psa_fast.ops.pool import Activation, Pooled, check_features, pool_backward, pool_forward, resolve_rows
from psa_fast.ops.precision import at_least_fp32


class ConceptPool(NamedTuple):
    """token_sum [B, R, E] and feature_sum [B, R, E], the weighted sums; mass [B, R], the features' share of p."""

    token_sum: Tensor
    feature_sum: Tensor
    mass: Tensor


def concept_pool(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_offset: Tensor | None = None,
    *,
    feature_bias: Tensor | None = None,
    activation: Activation | None = None,
    features_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> ConceptPool:
    """Pool the rows of two segments with the weights of one softmax.

    Args:
        tokens: [S0, E], the first keys of every sample, never copied; S0 may be 0.
        features: [B, S1, E].
        token_query: [B, R, E], what a row (a query's head) looks for among the tokens, scale included.
        feature_query: [B, R, E], the same among the features.
        feature_offset: [B, R], added to a row's scores of all features.
        feature_bias: [E], added to the features before the activation.
        activation: "silu" or None.
        features_mask: bool [B, S1], True = take part. A sample with no key at all gives NaN.
        backend: "torch", "triton" (up to 32 rows, 16 in fp32) or "auto", see `psa_fast.ops.backend`.

    Returns:
        ConceptPool in the dtype of `features` (mass: fp32 at least). The other inputs are cast to that dtype; softmax
        and sums are fp32 at least, whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together, two devices, or a backend that cannot run here.
        NotImplementedError: under forward-mode differentiation; in a second backward through the gradients.
    """
    if tokens.dim() != 2 or features.dim() != 3 or token_query.dim() != 3:
        raise ValueError(
            f"expected tokens [S0, E], features [B, S1, E], queries [B, R, E]; "
            f"got {tuple(tokens.shape)}, {tuple(features.shape)}, {tuple(token_query.shape)}"
        )
    rows = (features.shape[0], token_query.shape[1])
    for name, tensor, shape in (
        ("tokens", tokens, (tokens.shape[0], features.shape[2])),
        ("token_query", token_query, (*rows, features.shape[2])),
        ("feature_query", feature_query, (*rows, features.shape[2])),
        ("feature_offset", feature_offset, rows),
        ("feature_bias", feature_bias, features.shape[2:]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    check_features(features, activation, features_mask)
    same_device(
        "concept_pool",
        tokens=tokens,
        features=features,
        token_query=token_query,
        feature_query=feature_query,
        feature_offset=feature_offset,
        feature_bias=feature_bias,
        features_mask=features_mask,
    )
    no_forward_mode("concept_pool", tokens, features, token_query, feature_query, feature_offset, feature_bias)
    out = _concept_pool(
        tokens,
        features,
        token_query,
        feature_query,
        feature_offset,
        feature_bias,
        activation == "silu",
        features_mask,
        resolve_rows(backend, features, rows[1]),
    )
    return ConceptPool(*out[:3])


@torch.library.custom_op("psa_fast::concept_pool", mutates_args=())
def _concept_pool(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_offset: Tensor | None,
    feature_bias: Tensor | None,
    silu: bool,
    features_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        cast = _caster(features.dtype)
        return tuple(
            pool_forward(
                cast(tokens),
                features,
                cast(token_query),
                cast(feature_query),
                cast(feature_offset),
                cast(feature_bias),
                silu,
                features_mask,
                backend,
            )
        )  # type: ignore[return-value]


@_concept_pool.register_fake
def _(tokens, features, token_query, feature_query, feature_offset, feature_bias, silu, features_mask, backend):
    b, s1, e = features.shape
    r, keys, wide = token_query.shape[1], tokens.shape[0] + s1, at_least_fp32(features.dtype)
    sums = features.new_empty(b, r, e)
    rows = features.new_empty(b, r, dtype=wide)
    return sums, torch.empty_like(sums), rows, features.new_empty(b, r, keys, dtype=wide), torch.empty_like(rows)


@torch.library.custom_op("psa_fast::concept_pool_backward", mutates_args=())
def _concept_pool_backward(
    token_sum_grad: Tensor,
    feature_sum_grad: Tensor,
    mass_grad: Tensor,
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_bias: Tensor | None,
    silu: bool,
    token_sum: Tensor,
    feature_sum: Tensor,
    mass: Tensor,
    scores: Tensor,
    lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        cast = _caster(features.dtype)
        grads = pool_backward(
            token_sum_grad.to(features.dtype),
            feature_sum_grad.to(features.dtype),
            mass_grad.to(scores.dtype),
            cast(tokens),
            features,
            cast(token_query),
            cast(feature_query),
            cast(feature_bias),
            silu,
            Pooled(token_sum, feature_sum, mass, scores, lse),
            backend,
        )
        bias_grad = features.new_empty(0, dtype=scores.dtype) if grads.feature_bias is None else grads.feature_bias
        return (*grads[:5], bias_grad)


@_concept_pool_backward.register_fake
def _(token_sum_grad, feature_sum_grad, mass_grad, tokens, features, token_query, feature_query, feature_bias, *rest):
    scores = rest[4]
    sums = features.new_empty(token_query.shape)
    return (
        features.new_empty(tokens.shape),
        features.new_empty(features.shape),
        sums,
        torch.empty_like(sums),
        features.new_empty(token_query.shape[:2], dtype=scores.dtype),
        features.new_empty(0 if feature_bias is None else features.shape[2], dtype=scores.dtype),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    tokens, features, token_query, feature_query, feature_offset, feature_bias, silu, _, backend = inputs
    ctx.save_for_backward(tokens, features, token_query, feature_query, feature_offset, feature_bias, *output)
    ctx.silu, ctx.backend = silu, backend


def _backward(ctx, token_sum_grad, feature_sum_grad, mass_grad, *unused):
    tokens, features, token_query, feature_query, feature_offset, feature_bias, *saved = ctx.saved_tensors
    grads = _concept_pool_backward(
        token_sum_grad,
        feature_sum_grad,
        mass_grad,
        tokens,
        features,
        token_query,
        feature_query,
        feature_bias,
        ctx.silu,
        *saved,
        ctx.backend,
    )
    inputs = (tokens, features, token_query, feature_query, feature_offset, feature_bias)
    found = (None if x is None else g.to(x.dtype) for x, g in zip(inputs, grads, strict=True))
    return (*found, None, None, None)


_concept_pool.register_autograd(_backward, setup_context=_setup_context)
_concept_pool_backward.register_autograd(refuse_second_order("concept_pool"))


def _caster(dtype: torch.dtype) -> Callable[[Tensor | None], Any]:
    return lambda tensor: None if tensor is None else tensor.to(dtype)
