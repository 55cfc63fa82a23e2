"""The two-segment attention pool: shared tokens and per-sample features under one softmax, forward and backward.

    x_s = act(feature_s + bias)     s_0 = token_query . token     s_1 = feature_query . x + feature_offset
    p = softmax([s_0, s_1])         z_0 = p_0 tokens     z_1 = p_1 x     mass = sum(p_1)

Rows are (query, head) pairs, R of them for every sample. Forward is three launches: `scores` reads the features, the
tiny `softmax` turns a row of scores into weights, `pool` reads the features again, in part from L2. Backward has the
same `scores` (with dz in place of the queries), `softmax_grad`, and `pool_grad`, which reads the features once more and
writes their gradient once. Nothing is added atomically: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.concept_pool_kernels import pool, pool_grad, scores, softmax, softmax_grad
from psa_kernels.launch import Specialization, accumulator, float32_precision, next_power_of_2, triton_dtype
from psa_kernels.results import Pooled, PoolGrads


@dataclass(frozen=True)
class PoolConfig:
    """Keys and channels of a tile of features in `scores`, `pool` and `pool_grad`; warps and pipeline stages.

    `pool_grad` holds twice as much in registers as the others: a smaller tile, and more blocks on a multiprocessor in
    place of a longer pipeline.
    """

    score_keys: int = 32
    score_channels: int = 128
    pool_keys: int = 32
    pool_channels: int = 128
    grad_channels: int = 64
    num_warps: int = 4
    num_stages: int = 4
    grad_stages: int = 2


FEW_ROWS = PoolConfig()
MANY_ROWS = PoolConfig(score_channels=64, pool_keys=16, pool_channels=64, num_warps=8, num_stages=3)
# exact fp32 products are not tensor core instructions: larger tiles would spill
FP32 = PoolConfig(16, 16, 16, 32, 32, num_stages=2)

# keys that a program of the softmax takes at once; the paper's 640 are one block
SOFTMAX_KEYS = 1024
SOFTMAX_LAUNCH = {"num_warps": 4, "num_stages": 2}


def default_config(bytes_per_element: int, rows: int) -> PoolConfig:
    """The configuration for a width of element and a number of rows."""
    if bytes_per_element > 2:
        return FP32
    return FEW_ROWS if rows <= 16 else MANY_ROWS


def pool_forward(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    feature_offset: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    mask: Tensor | None,
    config: PoolConfig | None = None,
) -> Pooled:
    """Launch `scores`, `softmax` and `pool`.

    tokens [S0, E], features [B, S1, E], queries [B, R, E] of one dtype; feature_offset [B, R], bias [E], mask bool
    [B, S1]. The channel stride of tokens and features is 1, queries are contiguous. B, E and S0 + S1 are at least 1.
    """
    config = config or default_config(features.element_size(), token_query.shape[1])
    batch, s1, channels = features.shape
    s0, rows = tokens.shape[0], token_query.shape[1]
    acc = accumulator(features.dtype)
    score = features.new_empty(batch, rows, s0 + s1, dtype=acc)
    p = torch.empty_like(score, dtype=features.dtype)
    out = Pooled(
        torch.empty_like(token_query),
        torch.empty_like(feature_query),
        features.new_empty(batch, rows, dtype=acc),
        score,
        features.new_empty(batch, rows, dtype=acc),
    )
    with torch.cuda.device_of(features):  # Triton launches on the current one
        _launch_scores(
            tokens=tokens,
            features=features,
            token_query=token_query,
            feature_query=feature_query,
            offset=feature_offset,
            bias=bias,
            silu=silu,
            mask=mask,
            out=score,
            config=config,
        )
        softmax[(batch * rows,)](
            scores_ptr=score,
            p_ptr=p,
            mass_ptr=out.mass,
            lse_ptr=out.lse,
            s0=s0,
            s1=s1,
            BLOCK_N=SOFTMAX_KEYS,
            ACC=triton_dtype(acc),
            **SOFTMAX_LAUNCH,
        )
        pool[(triton.cdiv(channels, config.pool_channels), batch)](
            p_ptr=p,
            token_sum_ptr=out.token_sum,
            feature_sum_ptr=out.feature_sum,
            BLOCK_S=config.pool_keys,
            BLOCK_E=config.pool_channels,
            num_stages=config.num_stages,
            **_shared(tokens, features, bias, silu, rows, acc, config),
        )
    return out


def pool_backward(
    token_sum_grad: Tensor,
    feature_sum_grad: Tensor,
    mass_grad: Tensor,
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    bias: Tensor | None,
    silu: bool,
    pooled: Pooled,
    config: PoolConfig | None = None,
) -> PoolGrads:
    """Launch `scores` with the gradients as queries, `softmax_grad` and `pool_grad`.

    token_sum_grad and feature_sum_grad [B, R, E] contiguous in the features' dtype, mass_grad [B, R] contiguous. The
    tokens' gradient is two matrix products.
    """
    config = config or default_config(features.element_size(), token_query.shape[1])
    batch, s1, channels = features.shape
    s0, rows = tokens.shape[0], token_query.shape[1]
    acc = pooled.scores.dtype
    scores_grad = torch.empty_like(pooled.scores)
    p, ds = (torch.empty_like(pooled.scores, dtype=features.dtype) for _ in range(2))
    bias_grad = None if bias is None else features.new_empty(batch, channels, dtype=acc)
    features_grad = features.new_empty(batch, s1, channels)
    token_query_grad, feature_query_grad = torch.empty_like(token_query), torch.empty_like(feature_query)
    offset_grad = features.new_empty(batch, rows, dtype=acc)
    with torch.cuda.device_of(features):
        _launch_scores(
            tokens=tokens,
            features=features,
            token_query=token_sum_grad,
            feature_query=feature_sum_grad,
            offset=mass_grad,
            bias=bias,
            silu=silu,
            mask=None,
            out=scores_grad,
            config=config,
        )
        softmax_grad[(batch * rows,)](
            scores_ptr=pooled.scores,
            scores_grad_ptr=scores_grad,
            lse_ptr=pooled.lse,
            p_ptr=p,
            ds_ptr=ds,
            offset_grad_ptr=offset_grad,
            s0=s0,
            s1=s1,
            BLOCK_N=SOFTMAX_KEYS,
            ACC=triton_dtype(acc),
            **SOFTMAX_LAUNCH,
        )
        pool_grad[(triton.cdiv(channels, config.grad_channels), batch)](
            feature_query_ptr=feature_query,
            feature_sum_grad_ptr=feature_sum_grad,
            p_ptr=p,
            ds_ptr=ds,
            features_grad_ptr=features_grad,
            token_query_grad_ptr=token_query_grad,
            feature_query_grad_ptr=feature_query_grad,
            bias_grad_ptr=bias_grad,
            BLOCK_S=config.pool_keys,
            BLOCK_E=config.grad_channels,
            num_stages=config.grad_stages,
            **_shared(tokens, features, bias, silu, rows, acc, config),
        )
    token_p, token_ds = (x[..., :s0].view(batch * rows, s0).t() for x in (p, ds))
    tokens_grad = torch.mm(token_ds, token_query.view(batch * rows, channels))
    tokens_grad.addmm_(token_p, token_sum_grad.view(batch * rows, channels))
    bias_grad = None if bias_grad is None else bias_grad.sum(0)
    return PoolGrads(tokens_grad, features_grad, token_query_grad, feature_query_grad, offset_grad, bias_grad)


def _launch_scores(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    mask: Tensor | None,
    out: Tensor,
    config: PoolConfig,
) -> None:
    token_blocks = triton.cdiv(tokens.shape[0], config.score_keys)
    feature_blocks = triton.cdiv(features.shape[1], config.score_keys)
    scores[(token_blocks + feature_blocks, features.shape[0])](
        token_query_ptr=token_query,
        feature_query_ptr=feature_query,
        offset_ptr=offset,
        mask_ptr=mask,
        out_ptr=out,
        token_blocks=token_blocks,
        HAS_OFFSET=offset is not None,
        HAS_MASK=mask is not None,
        BLOCK_S=config.score_keys,
        BLOCK_E=config.score_channels,
        num_stages=config.num_stages,
        **_shared(tokens, features, bias, silu, token_query.shape[1], out.dtype, config),
    )


def _shared(
    tokens: Tensor, features: Tensor, bias: Tensor | None, silu: bool, rows: int, acc: torch.dtype, config: PoolConfig
) -> dict[str, Any]:
    """What every launch over the features gives: the segments, their layout and how they are read."""
    return {
        "tokens_ptr": tokens,
        "features_ptr": features,
        "bias_ptr": bias,
        "s0": tokens.shape[0],
        "s1": features.shape[1],
        "rows": rows,
        "channels": features.shape[2],
        "token_stride": tokens.stride(0),
        "sample_stride": features.stride(0),
        "feature_stride": features.stride(1),
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "BLOCK_R": _row_block(rows),
        "ACC": triton_dtype(acc),
        "PRECISION": float32_precision(features.dtype),
        "num_warps": config.num_warps,
    }


def _row_block(rows: int) -> int:
    return max(16, next_power_of_2(rows))


# element type, rows, whether all that is optional is on, as in the concept bottleneck, and the products' precision
_SHIPPED = (
    ("bf16", 16, True, "ieee"),
    ("bf16", 16, False, "ieee"),
    ("bf16", 32, True, "ieee"),
    ("fp16", 16, True, "ieee"),
    ("fp32", 16, True, "ieee"),
    ("fp32", 16, False, "ieee"),
    ("fp32", 16, True, "tf32"),
)


def _specializations() -> tuple[Specialization, ...]:
    found = []
    sizes = ("s0", "s1", "rows", "channels", "token_blocks", "token_stride", "sample_stride", "feature_stride")
    always = ("out_ptr", "scores_ptr", "scores_grad_ptr", "mass_ptr", "lse_ptr", "offset_grad_ptr")
    for element, rows, full, precision in _SHIPPED:
        c = default_config(4 if element == "fp32" else 2, rows)
        x, acc = f"*{element}", "*fp32"
        types = dict.fromkeys(sizes, "i32") | dict.fromkeys(always, acc)
        types |= dict.fromkeys(("bias_ptr", "bias_grad_ptr", "offset_ptr", "mask_ptr"), "constexpr")
        if full:
            types |= {"bias_ptr": x, "bias_grad_ptr": acc}
        shared = {
            "SILU": full,
            "HAS_BIAS": full,
            "BLOCK_R": _row_block(rows),
            "ACC": tl.float32,
            "PRECISION": precision,
        }
        tile = {"BLOCK_S": c.score_keys, "BLOCK_E": c.score_channels}
        masked = types | ({"offset_ptr": acc, "mask_ptr": "*i1"} if full else {})
        flags = {"HAS_OFFSET": full, "HAS_MASK": full}
        found.append(_specialization(scores, masked, x, shared | tile | flags, c))
        flags = {"HAS_OFFSET": True, "HAS_MASK": False}
        found.append(_specialization(scores, types | {"offset_ptr": acc}, x, shared | tile | flags, c))
        tile = {"BLOCK_S": c.pool_keys, "BLOCK_E": c.pool_channels}
        found.append(_specialization(pool, types, x, shared | tile, c))
        tile = {"BLOCK_S": c.pool_keys, "BLOCK_E": c.grad_channels}
        found.append(_specialization(pool_grad, types, x, shared | tile, replace(c, num_stages=c.grad_stages)))
        if full and rows == 16 and precision == "ieee":
            constants = {"BLOCK_N": SOFTMAX_KEYS, "ACC": tl.float32}
            config = PoolConfig(**SOFTMAX_LAUNCH)
            found += [_specialization(kernel, types, x, constants, config) for kernel in (softmax, softmax_grad)]
    return tuple(found)


def _specialization(kernel, types: dict[str, str], rest: str, constexprs: dict, config: PoolConfig) -> Specialization:
    """A pointer that `types` does not name is of type `rest`; one that is not given is a constexpr None."""
    signature = {n: "constexpr" if n in constexprs else types.get(n, rest) for n in kernel.arg_names}
    absent = {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constexprs}
    return Specialization(kernel, signature, constexprs | absent, config.num_warps, config.num_stages)


SPECIALIZATIONS = _specializations()
