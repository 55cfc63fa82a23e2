"""The arithmetic of the two-segment pool, in plain torch or handed to the kernels: no autograd, no checks of shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from psa_kernels.results import Pooled, PoolGrads
from torch import Tensor

from psa_fast.ops.backend import Backend, resolve, within
from psa_fast.ops.precision import at_least_fp32

Activation = Literal["silu"]

# elements of a chunk of features on the CPU: 16 MB in fp32, so that its second reading comes from the cache
_CHUNK_ELEMENTS = 1 << 22
# samples are the second dimension of the kernels' grids
_MOST_SAMPLES = 65535


def check_features(features: Tensor, activation: str | None, features_mask: Tensor | None) -> None:
    """Raise ValueError for an unknown activation or a mask that does not fit."""
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
    if features_mask is not None and (features_mask.shape != features.shape[:2] or features_mask.dtype != torch.bool):
        raise ValueError(f"features_mask must be bool {list(features.shape[:2])}, True = valid")


def resolve_rows(backend: Backend, features: Tensor, rows: int) -> Literal["torch", "triton"]:
    """The implementation for `rows` rows a sample; the kernels hold all of them in registers."""
    most = 32 if features.element_size() == 2 else 16
    limit = None
    if rows > most:
        limit = f"the pool takes at most {most} rows (queries x heads) a sample in {features.dtype}, got {rows}"
    elif features.device.type == "cuda" and features.dtype == torch.float64:
        limit = "the kernels of the pool have no fp64 products"
    elif features.shape[0] > _MOST_SAMPLES:
        limit = f"the pool takes at most {_MOST_SAMPLES} samples, got {features.shape[0]}"
    return within(resolve(backend, features), backend, limit)


def pool_forward(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_offset: Tensor | None,
    feature_bias: Tensor | None,
    silu: bool,
    features_mask: Tensor | None,
    backend: str,
) -> Pooled:
    """The forward of either implementation; all inputs in the dtype of the features, autocast off."""
    if backend == "triton" and features.numel():
        from psa_kernels import concept_pool as kernels

        return kernels.pool_forward(
            _rows(tokens),
            _rows(features),
            token_query.contiguous(),
            feature_query.contiguous(),
            None if feature_offset is None else feature_offset.contiguous().to(at_least_fp32(features.dtype)),
            None if feature_bias is None else feature_bias.contiguous(),
            silu,
            None if features_mask is None else features_mask.contiguous(),
        )
    b, s1, e = features.shape
    s0, r = tokens.shape[0], token_query.shape[1]
    wide = at_least_fp32(features.dtype)
    out = Pooled(
        features.new_empty(b, r, e),
        features.new_empty(b, r, e),
        features.new_empty(b, r, dtype=wide),
        features.new_empty(b, r, s0 + s1, dtype=wide),
        features.new_empty(b, r, dtype=wide),
    )
    out.scores[..., :s0] = (token_query.reshape(b * r, e) @ tokens.t()).view(b, r, s0)
    for part, _, x in _activated(features, feature_bias, silu):
        scores = out.scores[part]
        scores[..., s0:] = torch.bmm(feature_query[part], x.transpose(1, 2))
        if feature_offset is not None:
            scores[..., s0:] += feature_offset[part].unsqueeze(-1)
        if features_mask is not None:
            scores[..., s0:].masked_fill_(~features_mask[part].unsqueeze(1), float("-inf"))
        torch.logsumexp(scores, -1, out=out.lse[part])
        p = torch.exp(scores - out.lse[part].unsqueeze(-1))
        torch.sum(p[..., s0:], -1, out=out.mass[part])
        low = p.to(features.dtype)
        torch.bmm(low[..., s0:], x, out=out.feature_sum[part])
        out.token_sum[part] = low[..., :s0] @ tokens
    return out


def pool_backward(
    token_sum_grad: Tensor,
    feature_sum_grad: Tensor,
    mass_grad: Tensor,
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_bias: Tensor | None,
    silu: bool,
    pooled: Pooled,
    backend: str,
) -> PoolGrads:
    """The backward of either implementation; gradients of the sums in the dtype of the features."""
    if backend == "triton" and features.numel():
        from psa_kernels import concept_pool as kernels

        return kernels.pool_backward(
            token_sum_grad.contiguous(),
            feature_sum_grad.contiguous(),
            mass_grad.contiguous(),
            _rows(tokens),
            _rows(features),
            token_query.contiguous(),
            feature_query.contiguous(),
            None if feature_bias is None else feature_bias.contiguous(),
            silu,
            pooled,
        )
    b, s1, e = features.shape
    s0, r = tokens.shape[0], token_query.shape[1]
    wide = at_least_fp32(features.dtype)
    features_grad = features.new_empty(b, s1, e)
    feature_query_grad = features.new_empty(b, r, e)
    low_p = features.new_empty(b, r, s0 + s1)
    low_ds = torch.empty_like(low_p)
    scores_grad = features.new_empty(b, r, s0 + s1, dtype=wide)
    scores_grad[..., :s0] = (token_sum_grad.reshape(b * r, e) @ tokens.t()).view(b, r, s0)
    bias_grad = None if feature_bias is None else features.new_zeros(e, dtype=wide)
    offset_grad = features.new_empty(b, r, dtype=wide)
    for part, before, x in _activated(features, feature_bias, silu):
        grad = scores_grad[part]
        grad[..., s0:] = torch.bmm(feature_sum_grad[part], x.transpose(1, 2))
        grad[..., s0:] += mass_grad[part].unsqueeze(-1)
        # softmax backward; a masked key has p = 0, hence ds = 0
        p = torch.exp(pooled.scores[part] - pooled.lse[part].unsqueeze(-1))
        ds = p * (grad - (p * grad).sum(-1, keepdim=True))
        torch.sum(ds[..., s0:], -1, out=offset_grad[part])
        low_p[part], low_ds[part] = p, ds
        torch.bmm(low_ds[part][..., s0:], x, out=feature_query_grad[part])
        # one product over 2R rows writes the features' gradient once
        weights = torch.cat([low_ds[part][..., s0:], low_p[part][..., s0:]], dim=1).transpose(1, 2)
        x_grad = features_grad[part]
        torch.bmm(weights, torch.cat([feature_query[part], feature_sum_grad[part]], dim=1), out=x_grad)
        if silu:
            torch.ops.aten.silu_backward.grad_input(x_grad, before, grad_input=x_grad)
        if bias_grad is not None:
            bias_grad += x_grad.sum((0, 1), dtype=wide)
    ds0, p0 = low_ds[..., :s0].reshape(b * r, s0), low_p[..., :s0].reshape(b * r, s0)
    tokens_grad = ds0.t() @ token_query.reshape(b * r, e)
    tokens_grad.addmm_(p0.t(), token_sum_grad.reshape(b * r, e))
    return PoolGrads(
        tokens_grad,
        features_grad,
        (ds0 @ tokens).view(b, r, e),
        feature_query_grad,
        offset_grad,
        bias_grad,
    )


def _activated(features: Tensor, bias: Tensor | None, silu: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Samples in chunks, with features + bias and act of it; on the CPU in buffers that stay in the cache."""
    b, s1, e = features.shape
    copied = silu or bias is not None
    step = max(1, _CHUNK_ELEMENTS // max(1, s1 * e)) if copied and features.device.type == "cpu" else max(b, 1)
    before_buffer, x_buffer = (
        features.new_empty(min(step, b) if used else 0, s1, e) for used in (bias is not None, silu)
    )
    for start in range(0, b, step):
        part = slice(start, min(start + step, b))
        before = features[part]
        if bias is not None:
            before = torch.add(before, bias, out=before_buffer[: before.shape[0]])
        yield part, before, torch.ops.aten.silu.out(before, out=x_buffer[: before.shape[0]]) if silu else before


def _rows(tensor: Tensor) -> Tensor:
    """With channels of stride 1, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
