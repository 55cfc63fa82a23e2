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
from triton.language.extra import libdevice

from psa_kernels.launch import Specialization, float32_precision, interpreted, next_power_of_2
from psa_kernels.results import Pooled, PoolGrads


@dataclass(frozen=True)
class PoolConfig:
    """Keys and channels of a tile of features in `scores`, `pool` and `pool_grad`; warps and pipeline stages.

    `pool_grad` holds twice as much in registers as the others and has tiles and stages of its own.
    """

    score_keys: int = 32
    score_channels: int = 128
    pool_keys: int = 32
    pool_channels: int = 128
    grad_channels: int = 64
    num_warps: int = 4
    num_stages: int = 4
    grad_stages: int = 3


FEW_ROWS = PoolConfig()
MANY_ROWS = PoolConfig(score_channels=64, pool_keys=16, pool_channels=64, num_warps=8, num_stages=3)
# exact fp32 products are not tensor core instructions: larger tiles would spill
FP32 = PoolConfig(16, 32, 16, 32, 32, num_stages=2, grad_stages=2)

# keys that a program of the softmax takes at once; the paper's 640 are one block
SOFTMAX_KEYS = 1024


def default_config(bytes_per_element: int, rows: int) -> PoolConfig:
    """The configuration for a width of element and a number of rows."""
    if bytes_per_element > 2:
        return FP32
    return FEW_ROWS if rows <= 16 else MANY_ROWS


# tl.exp and "/" spend half their instructions on subnormal numbers and on divisors beyond 2**126, which a sigmoid does
# not need: its own cost, not the memory, would limit the kernels. The interpreter has no libdevice.
_LIBDEVICE = tl.constexpr(not interpreted())

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _activate(x, bias_ptr, channel, channels, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """x [keys, channels] in ACC, plus bias; returns (act(x), d act / dx)."""
    x = x.to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACC)[None, :]
    slope = tl.full(x.shape, 1.0, ACC)
    if SILU:
        if _LIBDEVICE:
            gate = libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))
        else:
            gate = 1.0 / (1.0 + tl.exp(-x))
        slope = gate * (1.0 + x * (1.0 - gate))
        x = x * gate
    return x, slope


@triton.jit
def _dots(
    x_ptr, query_ptr, bias_ptr, key_ok, row_ok, channels,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """query . act(x) [BLOCK_R, BLOCK_S] of pointers to rows, query [BLOCK_R] and x [BLOCK_S]."""
    lane = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_R, BLOCK_S], dtype=ACC)
    for start in range(0, channels, BLOCK_E):
        channel = start + lane
        ok = channel < channels
        x = tl.load(x_ptr[:, None] + channel[None, :], mask=key_ok[:, None] & ok[None, :], other=0.0)
        query = tl.load(query_ptr[:, None] + channel[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        if SILU or HAS_BIAS:
            active, _ = _activate(x, bias_ptr, channel, channels, SILU, HAS_BIAS, ACC)
            x = active.to(query.dtype)
        acc = tl.dot(query, tl.trans(x), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def scores(
    tokens_ptr, features_ptr, bias_ptr, token_query_ptr, feature_query_ptr, offset_ptr, mask_ptr, out_ptr,
    s0, s1, rows, channels, token_blocks, token_stride, sample_stride, feature_stride,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks + feature blocks, B): out [B, R, S0 + S1]."""
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    own_row = sample * rows + row
    lane = tl.arange(0, BLOCK_S)
    to = out_ptr + own_row[:, None] * (s0 + s1)
    # a loop for each segment: pointers chosen by a branch have no known alignment, and Triton 3.6 would not prefetch
    if block < token_blocks:
        key = block * BLOCK_S + lane
        key_ok = key < s0
        acc = _dots(
            tokens_ptr + key.to(tl.int64) * token_stride, token_query_ptr + own_row * channels, bias_ptr, key_ok,
            row_ok, channels, False, False, BLOCK_R, BLOCK_S, BLOCK_E, ACC, PRECISION,
        )  # fmt: skip
        tl.store(to + key[None, :], acc, mask=row_ok[:, None] & key_ok[None, :])
    else:
        key = (block - token_blocks) * BLOCK_S + lane
        key_ok = key < s1
        acc = _dots(
            features_ptr + sample * sample_stride + key.to(tl.int64) * feature_stride,
            feature_query_ptr + own_row * channels, bias_ptr, key_ok,
            row_ok, channels, SILU, HAS_BIAS, BLOCK_R, BLOCK_S, BLOCK_E, ACC, PRECISION,
        )  # fmt: skip
        if HAS_OFFSET:
            acc += tl.load(offset_ptr + own_row, mask=row_ok, other=0.0).to(ACC)[:, None]
        if HAS_MASK:
            valid = tl.load(mask_ptr + sample * s1 + key, mask=key_ok, other=0)
            acc = tl.where((valid != 0)[None, :], acc, float("-inf"))
        tl.store(to + (s0 + key)[None, :], acc, mask=row_ok[:, None] & key_ok[None, :])


@triton.jit
def softmax(scores_ptr, p_ptr, mass_ptr, lse_ptr, s0, s1, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """Grid (B * R): p [B, R, S0 + S1], its sum over features, and logsumexp."""
    row = tl.program_id(0).to(tl.int64)
    keys = s0 + s1
    scores_ptr += row * keys
    p_ptr += row * keys
    lane = tl.arange(0, BLOCK_N)
    top = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0.0, ACC)
    for start in range(0, keys, BLOCK_N):
        key = start + lane
        part = tl.load(scores_ptr + key, mask=key < keys, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(part, 0))
        # while nothing is seen yet, -inf - -inf must not arise
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2((top - base) * _LOG2E) + tl.sum(tl.exp2((part - base) * _LOG2E), 0)
        top = new_top
    # a sample without any key: -inf + log(0), and NaN below, as in torch
    lse = top + tl.log(total)
    mass = tl.full((), 0.0, ACC)
    for start in range(0, keys, BLOCK_N):
        key = start + lane
        part = tl.load(scores_ptr + key, mask=key < keys, other=float("-inf"))
        p = tl.exp2((part - lse) * _LOG2E)
        mass += tl.sum(tl.where((key >= s0) & (key < keys), p, 0.0), 0)
        tl.store(p_ptr + key, p.to(p_ptr.dtype.element_ty), mask=key < keys)
    tl.store(mass_ptr + row, mass)
    tl.store(lse_ptr + row, lse)


@triton.jit
def softmax_grad(
    scores_ptr, scores_grad_ptr, lse_ptr, p_ptr, ds_ptr, offset_grad_ptr, s0, s1,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (B * R): p and ds = p (dp - sum(p dp)) [B, R, S0 + S1], and ds summed over the features."""
    row = tl.program_id(0).to(tl.int64)
    keys = s0 + s1
    scores_ptr += row * keys
    scores_grad_ptr += row * keys
    lane = tl.arange(0, BLOCK_N)
    lse = tl.load(lse_ptr + row)
    delta = tl.full((), 0.0, ACC)
    for start in range(0, keys, BLOCK_N):
        key = start + lane
        part = tl.load(scores_ptr + key, mask=key < keys, other=float("-inf"))
        grad = tl.load(scores_grad_ptr + key, mask=key < keys, other=0.0)
        delta += tl.sum(tl.exp2((part - lse) * _LOG2E) * grad, 0)
    offset_grad = tl.full((), 0.0, ACC)
    for start in range(0, keys, BLOCK_N):
        key = start + lane
        part = tl.load(scores_ptr + key, mask=key < keys, other=float("-inf"))
        grad = tl.load(scores_grad_ptr + key, mask=key < keys, other=0.0)
        p = tl.exp2((part - lse) * _LOG2E)
        ds = p * (grad - delta)
        offset_grad += tl.sum(tl.where((key >= s0) & (key < keys), ds, 0.0), 0)
        tl.store(p_ptr + row * keys + key, p.to(p_ptr.dtype.element_ty), mask=key < keys)
        tl.store(ds_ptr + row * keys + key, ds.to(ds_ptr.dtype.element_ty), mask=key < keys)
    tl.store(offset_grad_ptr + row, offset_grad)


@triton.jit
def pool(
    tokens_ptr, features_ptr, bias_ptr, p_ptr, token_sum_ptr, feature_sum_ptr,
    s0, s1, rows, channels, token_stride, sample_stride, feature_stride,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, B)."""
    block = tl.program_id(0)
    # what `scores` read last is in L2 still
    sample = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    own_row = sample * rows + row
    channel = block * BLOCK_E + tl.arange(0, BLOCK_E)
    ok = channel < channels
    lane = tl.arange(0, BLOCK_S)
    p_rows = p_ptr + own_row[:, None] * (s0 + s1)
    place = own_row[:, None] * channels + channel[None, :]
    place_ok = row_ok[:, None] & ok[None, :]

    acc = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    for start in range(0, s0, BLOCK_S):
        key = start + lane
        key_ok = key < s0
        p = tl.load(p_rows + key[None, :], mask=row_ok[:, None] & key_ok[None, :], other=0.0)
        x = tl.load(
            tokens_ptr + key.to(tl.int64)[:, None] * token_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(p, x, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(token_sum_ptr + place, acc.to(token_sum_ptr.dtype.element_ty), mask=place_ok)

    acc = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    features = features_ptr + sample * sample_stride
    for start in range(0, s1, BLOCK_S):
        key = start + lane
        key_ok = key < s1
        p = tl.load(p_rows + (s0 + key)[None, :], mask=row_ok[:, None] & key_ok[None, :], other=0.0)
        raw = tl.load(
            features + key.to(tl.int64)[:, None] * feature_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        active, _ = _activate(raw, bias_ptr, channel, channels, SILU, HAS_BIAS, ACC)
        acc = tl.dot(p, active.to(raw.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(feature_sum_ptr + place, acc.to(feature_sum_ptr.dtype.element_ty), mask=place_ok)


@triton.jit
def pool_grad(
    tokens_ptr, features_ptr, bias_ptr, feature_query_ptr, feature_sum_grad_ptr, p_ptr, ds_ptr,
    features_grad_ptr, token_query_grad_ptr, feature_query_grad_ptr, bias_grad_ptr,
    s0, s1, rows, channels, token_stride, sample_stride, feature_stride,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, B). bias_grad [B, E] is summed over B by the launcher."""
    block = tl.program_id(0)
    sample = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    own_row = sample * rows + row
    lane = tl.arange(0, BLOCK_S)
    channel = block * BLOCK_E + tl.arange(0, BLOCK_E)
    ok = channel < channels
    place = own_row[:, None] * channels + channel[None, :]
    place_ok = row_ok[:, None] & ok[None, :]
    weight_rows = own_row[:, None] * (s0 + s1)
    query = tl.load(feature_query_ptr + place, mask=place_ok, other=0.0)
    sum_grad = tl.load(feature_sum_grad_ptr + place, mask=place_ok, other=0.0)

    query_grad = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    bias_grad = tl.zeros([BLOCK_E], dtype=ACC)
    for start in range(0, s1, BLOCK_S):
        key = start + lane
        key_ok = key < s1
        both = row_ok[:, None] & key_ok[None, :]
        p = tl.load(p_ptr + weight_rows + (s0 + key)[None, :], mask=both, other=0.0)
        ds = tl.load(ds_ptr + weight_rows + (s0 + key)[None, :], mask=both, other=0.0)
        here = key.to(tl.int64)[:, None]
        inside = key_ok[:, None] & ok[None, :]
        raw = tl.load(
            features_ptr + sample * sample_stride + here * feature_stride + channel[None, :], mask=inside, other=0.0
        )
        active, slope = _activate(raw, bias_ptr, channel, channels, SILU, HAS_BIAS, ACC)
        query_grad = tl.dot(ds, active.to(raw.dtype), query_grad, input_precision=PRECISION, out_dtype=ACC)
        grad = tl.dot(tl.trans(p), sum_grad, input_precision=PRECISION, out_dtype=ACC)
        grad = tl.dot(tl.trans(ds), query, grad, input_precision=PRECISION, out_dtype=ACC)
        if SILU:
            grad *= slope
        if HAS_BIAS:
            bias_grad += tl.sum(tl.where(inside, grad, 0.0), 0)
        tl.store(
            features_grad_ptr + (sample * s1 + here) * channels + channel[None, :],
            grad.to(features_grad_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
    tl.store(feature_query_grad_ptr + place, query_grad.to(feature_query_grad_ptr.dtype.element_ty), mask=place_ok)
    if HAS_BIAS:
        tl.store(bias_grad_ptr + sample * channels + channel, bias_grad, mask=ok)

    query_grad = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    for start in range(0, s0, BLOCK_S):
        key = start + lane
        key_ok = key < s0
        ds = tl.load(ds_ptr + weight_rows + key[None, :], mask=row_ok[:, None] & key_ok[None, :], other=0.0)
        x = tl.load(
            tokens_ptr + key.to(tl.int64)[:, None] * token_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        query_grad = tl.dot(ds, x, query_grad, input_precision=PRECISION, out_dtype=ACC)
    tl.store(token_query_grad_ptr + place, query_grad.to(token_query_grad_ptr.dtype.element_ty), mask=place_ok)


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
    acc = _accumulator(features.dtype)
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
        _launch_scores(tokens, features, token_query, feature_query, feature_offset, bias, silu, mask, score, config)
        softmax[(batch * rows,)](score, p, out.mass, out.lse, s0, s1, BLOCK_N=SOFTMAX_KEYS, ACC=_triton_type(acc))
        pool[(triton.cdiv(channels, config.pool_channels), batch)](
            tokens, features, bias, p, out.token_sum, out.feature_sum,
            s0, s1, rows, channels, tokens.stride(0), features.stride(0), features.stride(1),
            SILU=silu, HAS_BIAS=bias is not None,
            BLOCK_S=config.pool_keys, BLOCK_E=config.pool_channels, num_stages=config.num_stages,
            **_shared(rows, acc, features.dtype, config),
        )  # fmt: skip
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
            tokens, features, token_sum_grad, feature_sum_grad, mass_grad, bias, silu, None, scores_grad, config
        )
        softmax_grad[(batch * rows,)](
            pooled.scores, scores_grad, pooled.lse, p, ds, offset_grad, s0, s1,
            BLOCK_N=SOFTMAX_KEYS, ACC=_triton_type(acc),
        )  # fmt: skip
        pool_grad[(triton.cdiv(channels, config.grad_channels), batch)](
            tokens, features, bias, feature_query, feature_sum_grad, p, ds,
            features_grad, token_query_grad, feature_query_grad, bias_grad,
            s0, s1, rows, channels, tokens.stride(0), features.stride(0), features.stride(1),
            SILU=silu, HAS_BIAS=bias is not None,
            BLOCK_S=config.pool_keys, BLOCK_E=config.grad_channels, num_stages=config.grad_stages,
            **_shared(rows, acc, features.dtype, config),
        )  # fmt: skip
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
    batch, s1, channels = features.shape
    s0, rows = tokens.shape[0], token_query.shape[1]
    token_blocks = triton.cdiv(s0, config.score_keys)
    scores[(token_blocks + triton.cdiv(s1, config.score_keys), batch)](
        tokens, features, bias, token_query, feature_query, offset, mask, out,
        s0, s1, rows, channels, token_blocks, tokens.stride(0), features.stride(0), features.stride(1),
        SILU=silu, HAS_BIAS=bias is not None, HAS_OFFSET=offset is not None, HAS_MASK=mask is not None,
        BLOCK_S=config.score_keys, BLOCK_E=config.score_channels, num_stages=config.num_stages,
        **_shared(rows, out.dtype, features.dtype, config),
    )  # fmt: skip


def _shared(rows: int, acc: torch.dtype, dtype: torch.dtype, config: PoolConfig) -> dict[str, Any]:
    """What every launch over the features gives besides."""
    return {
        "BLOCK_R": _row_block(rows),
        "ACC": _triton_type(acc),
        "PRECISION": float32_precision(dtype),
        "num_warps": config.num_warps,
    }


def _row_block(rows: int) -> int:
    return max(16, next_power_of_2(rows))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


# element type, rows, and whether all that is optional is on, as in the concept bottleneck
_SHIPPED = (
    ("bf16", 16, True),
    ("bf16", 16, False),
    ("bf16", 32, True),
    ("fp16", 16, True),
    ("fp32", 16, True),
    ("fp32", 16, False),
)


def _specializations() -> tuple[Specialization, ...]:
    found = []
    sizes = ("s0", "s1", "rows", "channels", "token_blocks", "token_stride", "sample_stride", "feature_stride")
    always = ("out_ptr", "scores_ptr", "scores_grad_ptr", "mass_ptr", "lse_ptr", "offset_grad_ptr")
    for element, rows, full in _SHIPPED:
        c = default_config(4 if element == "fp32" else 2, rows)
        x, acc = f"*{element}", "*fp32"
        types = dict.fromkeys(sizes, "i32") | dict.fromkeys(always, acc)
        types |= dict.fromkeys(("bias_ptr", "bias_grad_ptr", "offset_ptr", "mask_ptr"), "constexpr")
        if full:
            types |= {"bias_ptr": x, "bias_grad_ptr": acc}
        shared = {"SILU": full, "HAS_BIAS": full, "BLOCK_R": _row_block(rows), "ACC": tl.float32, "PRECISION": "ieee"}
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
        if full and rows == 16:
            constants = {"BLOCK_N": SOFTMAX_KEYS, "ACC": tl.float32}
            found += [_specialization(kernel, types, x, constants, PoolConfig()) for kernel in (softmax, softmax_grad)]
    return tuple(found)


def _specialization(kernel, types: dict[str, str], rest: str, constexprs: dict, config: PoolConfig) -> Specialization:
    """A pointer that `types` does not name is of type `rest`, one that is not given a constexpr None, as in a launch."""
    signature = {n: "constexpr" if n in constexprs else types.get(n, rest) for n in kernel.arg_names}
    absent = {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constexprs}
    return Specialization(kernel, signature, constexprs | absent, config.num_warps, config.num_stages)


SPECIALIZATIONS = _specializations()
