"""The two-segment attention pool: shared tokens and per-sample features under one softmax, forward and backward.

    x_s = act(feature_s + bias)     s_0 = token_query . token     s_1 = feature_query . x + feature_offset
    p = softmax([s_0, s_1])         z_0 = p_0 tokens     z_1 = p_1 x     mass = sum(p_1)

Rows are (query, head) pairs, R of them for every sample. `scores` is one launch that reads the features once, `pool`
another that reads them again, mostly from L2; backward has the same `scores` (with dz in place of the queries) and one
launch, `pool_grad`, that reads the features once more and writes their gradient once. Nothing is added atomically: the
same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from psa_kernels.launch import Specialization, float32_precision, interpreted, next_power_of_2
from psa_kernels.results import Pooled, PoolGrads


@dataclass(frozen=True)
class PoolConfig:
    """Tile sizes: keys and channels of a tile of features, and of the softmax statistics; warps and pipeline stages."""

    score_keys: int = 32
    score_channels: int = 64
    pool_keys: int = 32
    pool_channels: int = 64
    statistics_keys: int = 128
    num_warps: int = 4
    num_stages: int = 3


FEW_ROWS = PoolConfig()
MANY_ROWS = PoolConfig(pool_keys=16, num_warps=8)
# exact fp32 products are not tensor core instructions: larger tiles would spill
FP32 = PoolConfig(score_keys=16, score_channels=32, pool_keys=16, pool_channels=32, num_stages=2)


def default_config(bytes_per_element: int, rows: int) -> PoolConfig:
    """The configuration for a width of element and a number of rows."""
    if bytes_per_element > 2:
        return FP32
    return FEW_ROWS if rows <= 16 else MANY_ROWS


# tl.exp and "/" spend half their instructions on subnormal numbers and on divisors beyond 2**126, which a sigmoid does
# not need: its own cost, not the memory, would limit the kernels. The interpreter has no libdevice.
_LIBDEVICE = tl.constexpr(not interpreted())


@triton.jit
def _activate(x, bias_ptr, channel, channels, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """x [keys, channels] in ACC, plus bias; returns (act(x), d act / dx)."""
    x = x.to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACC)[None, :]
    slope = x * 0.0 + 1.0
    if SILU:
        if _LIBDEVICE:
            gate = libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))
        else:
            gate = 1.0 / (1.0 + tl.exp(-x))
        slope = gate * (1.0 + x * (1.0 - gate))
        x = x * gate
    return x, slope


@triton.jit(do_not_specialize=["batch"])
def scores(
    tokens_ptr, features_ptr, bias_ptr, token_query_ptr, feature_query_ptr, offset_ptr, mask_ptr,
    token_sum_ptr, feature_sum_ptr, mass_ptr,
    out_ptr, delta_ptr,
    batch, s0, s1, rows, channels, token_blocks, token_stride, sample_stride, feature_stride,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_MASK: tl.constexpr,
    WITH_DELTA: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks + feature blocks, B). WITH_DELTA also writes delta [2, B, R] = sum_e query * sum (+ mass)."""
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    lane = tl.arange(0, BLOCK_E)
    is_token = block < token_blocks
    first = block == 0
    if is_token:
        key = block * BLOCK_S + tl.arange(0, BLOCK_S)
        key_ok = key < s0
        x_ptr = tokens_ptr + key.to(tl.int64) * token_stride
        query_ptr = token_query_ptr
        if WITH_DELTA:
            sum_ptr = token_sum_ptr
        column = key
    else:
        first = block == token_blocks
        key = (block - token_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        key_ok = key < s1
        x_ptr = features_ptr + sample * sample_stride + key.to(tl.int64) * feature_stride
        query_ptr = feature_query_ptr
        if WITH_DELTA:
            sum_ptr = feature_sum_ptr
        column = s0 + key
    own_row = sample * rows + row
    query_rows = own_row[:, None] * channels
    acc = tl.zeros([BLOCK_R, BLOCK_S], dtype=ACC)
    delta = tl.zeros([BLOCK_R], dtype=ACC)
    for start in range(0, channels, BLOCK_E):
        channel = start + lane
        ok = channel < channels
        raw = tl.load(x_ptr[:, None] + channel[None, :], mask=key_ok[:, None] & ok[None, :], other=0.0)
        query = tl.load(query_ptr + query_rows + channel[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        x = raw
        if SILU or HAS_BIAS:
            if not is_token:
                active, _ = _activate(raw, bias_ptr, channel, channels, SILU, HAS_BIAS, ACC)
                x = active.to(raw.dtype)
        acc = tl.dot(query, tl.trans(x), acc, input_precision=PRECISION, out_dtype=ACC)
        if WITH_DELTA:
            if first:
                pooled = tl.load(sum_ptr + query_rows + channel[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
                delta += tl.sum(query.to(ACC) * pooled.to(ACC), 1)
    if HAS_OFFSET:
        if not is_token:
            offset = tl.load(offset_ptr + own_row, mask=row_ok, other=0.0).to(ACC)
            acc += offset[:, None]
            if WITH_DELTA:
                delta += offset * tl.load(mass_ptr + own_row, mask=row_ok, other=0.0).to(ACC)
    if HAS_MASK:
        if not is_token:
            valid = tl.load(mask_ptr + sample * s1 + key, mask=key_ok, other=0)
            acc = tl.where((valid != 0)[None, :], acc, float("-inf"))
    tl.store(out_ptr + own_row[:, None] * (s0 + s1) + column[None, :], acc, mask=row_ok[:, None] & key_ok[None, :])
    if WITH_DELTA:
        if first:
            segment = tl.where(is_token, 0, 1)
            tl.store(delta_ptr + segment * batch * rows + own_row, delta, mask=row_ok)


@triton.jit
def pool(
    tokens_ptr, features_ptr, bias_ptr, scores_ptr, token_sum_ptr, feature_sum_ptr, mass_ptr, lse_ptr,
    s0, s1, rows, channels, token_stride, sample_stride, feature_stride,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, B)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    own_row = sample * rows + row
    channel = block * BLOCK_E + tl.arange(0, BLOCK_E)
    ok = channel < channels
    keys = s0 + s1
    scores_row = scores_ptr + own_row[:, None] * keys
    lane = tl.arange(0, BLOCK_S)

    wide = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_R], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK_R], dtype=ACC)
    for start in range(0, keys, BLOCK_N):
        here = start + wide
        part = tl.load(scores_row + here[None, :], mask=row_ok[:, None] & (here < keys)[None, :], other=float("-inf"))
        new_top = tl.maximum(top, tl.max(part, 1))
        # a row of which nothing is seen yet: -inf - -inf would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((part - base[:, None]) * LOG2E), 1)
        top = new_top
    # a sample without any key: -inf + log(0), and NaN below, as in torch
    lse = tl.where(row_ok, top + tl.log(tl.where(row_ok, total, 1.0)), 0.0)

    acc = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    for start in range(0, s0, BLOCK_S):
        key = start + lane
        key_ok = key < s0
        part = tl.load(scores_row + key[None, :], mask=row_ok[:, None] & key_ok[None, :], other=float("-inf"))
        p = tl.where(key_ok[None, :] & row_ok[:, None], tl.exp2((part - lse[:, None]) * LOG2E), 0.0)
        x = tl.load(
            tokens_ptr + key.to(tl.int64)[:, None] * token_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(p.to(x.dtype), x, acc, input_precision=PRECISION, out_dtype=ACC)
    place = own_row[:, None] * channels + channel[None, :]
    place_ok = row_ok[:, None] & ok[None, :]
    tl.store(token_sum_ptr + place, acc.to(token_sum_ptr.dtype.element_ty), mask=place_ok)

    acc = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    mass = tl.zeros([BLOCK_R], dtype=ACC)
    features = features_ptr + sample * sample_stride
    for start in range(0, s1, BLOCK_S):
        key = start + lane
        key_ok = key < s1
        part = tl.load(scores_row + (s0 + key)[None, :], mask=row_ok[:, None] & key_ok[None, :], other=float("-inf"))
        p = tl.where(key_ok[None, :] & row_ok[:, None], tl.exp2((part - lse[:, None]) * LOG2E), 0.0)
        mass += tl.sum(p, 1)
        raw = tl.load(
            features + key.to(tl.int64)[:, None] * feature_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        active, _ = _activate(raw, bias_ptr, channel, channels, SILU, HAS_BIAS, ACC)
        acc = tl.dot(p.to(raw.dtype), active.to(raw.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(feature_sum_ptr + place, acc.to(feature_sum_ptr.dtype.element_ty), mask=place_ok)
    if block == 0:
        tl.store(lse_ptr + own_row, lse, mask=row_ok)
        tl.store(mass_ptr + own_row, mass.to(mass_ptr.dtype.element_ty), mask=row_ok)


@triton.jit(do_not_specialize=["batch"])
def pool_grad(
    tokens_ptr, features_ptr, bias_ptr, feature_query_ptr, feature_sum_grad_ptr,
    scores_ptr, scores_grad_ptr, lse_ptr, delta_ptr,
    features_grad_ptr, token_query_grad_ptr, feature_query_grad_ptr, offset_grad_ptr, bias_grad_ptr, token_p_ptr,
    token_ds_ptr,
    batch, s0, s1, rows, channels, token_stride, sample_stride, feature_stride,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, B). bias_grad [B, E] is summed over B by the launcher; token_p and token_ds [B * R, S0]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    row_ok = row < rows
    own_row = sample * rows + row
    lane = tl.arange(0, BLOCK_S)
    channel = block * BLOCK_E + tl.arange(0, BLOCK_E)
    ok = channel < channels
    place = own_row[:, None] * channels + channel[None, :]
    place_ok = row_ok[:, None] & ok[None, :]
    query = tl.load(feature_query_ptr + place, mask=place_ok, other=0.0)
    sum_grad = tl.load(feature_sum_grad_ptr + place, mask=place_ok, other=0.0)
    lse = tl.load(lse_ptr + own_row, mask=row_ok, other=0.0)
    delta = tl.load(delta_ptr + own_row, mask=row_ok, other=0.0)
    delta += tl.load(delta_ptr + batch * rows + own_row, mask=row_ok, other=0.0)
    scores_row = own_row[:, None] * (s0 + s1)

    query_grad = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    offset_grad = tl.zeros([BLOCK_R], dtype=ACC)
    bias_grad = tl.zeros([BLOCK_E], dtype=ACC)
    for start in range(0, s1, BLOCK_S):
        key = start + lane
        key_ok = key < s1
        both = row_ok[:, None] & key_ok[None, :]
        at = scores_row + (s0 + key)[None, :]
        part = tl.load(scores_ptr + at, mask=both, other=float("-inf"))
        p = tl.where(both, tl.exp2((part - lse[:, None]) * LOG2E), 0.0)
        ds = p * (tl.load(scores_grad_ptr + at, mask=both, other=0.0) - delta[:, None])
        offset_grad += tl.sum(ds, 1)
        here = key.to(tl.int64)[:, None]
        inside = key_ok[:, None] & ok[None, :]
        raw = tl.load(
            features_ptr + sample * sample_stride + here * feature_stride + channel[None, :], mask=inside, other=0.0
        )
        active, slope = _activate(raw, bias_ptr, channel, channels, SILU, HAS_BIAS, ACC)
        low_ds = ds.to(raw.dtype)
        query_grad = tl.dot(low_ds, active.to(raw.dtype), query_grad, input_precision=PRECISION, out_dtype=ACC)
        grad = tl.dot(tl.trans(p.to(raw.dtype)), sum_grad, input_precision=PRECISION, out_dtype=ACC)
        grad = tl.dot(tl.trans(low_ds), query, grad, input_precision=PRECISION, out_dtype=ACC) * slope
        grad = tl.where(inside, grad, 0.0)
        bias_grad += tl.sum(grad, 0)
        tl.store(
            features_grad_ptr + (sample * s1 + here) * channels + channel[None, :],
            grad.to(features_grad_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
    tl.store(feature_query_grad_ptr + place, query_grad.to(feature_query_grad_ptr.dtype.element_ty), mask=place_ok)
    if HAS_BIAS:
        tl.store(bias_grad_ptr + sample * channels + channel, bias_grad, mask=ok)
    if block == 0:
        tl.store(offset_grad_ptr + own_row, offset_grad, mask=row_ok)

    query_grad = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    for start in range(0, s0, BLOCK_S):
        key = start + lane
        key_ok = key < s0
        both = row_ok[:, None] & key_ok[None, :]
        at = scores_row + key[None, :]
        part = tl.load(scores_ptr + at, mask=both, other=float("-inf"))
        p = tl.where(both, tl.exp2((part - lse[:, None]) * LOG2E), 0.0)
        ds = p * (tl.load(scores_grad_ptr + at, mask=both, other=0.0) - delta[:, None])
        x = tl.load(
            tokens_ptr + key.to(tl.int64)[:, None] * token_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        query_grad = tl.dot(ds.to(x.dtype), x, query_grad, input_precision=PRECISION, out_dtype=ACC)
        if block == 0:
            to = own_row[:, None] * s0 + key[None, :]
            tl.store(token_p_ptr + to, p.to(token_p_ptr.dtype.element_ty), mask=both)
            tl.store(token_ds_ptr + to, ds.to(token_ds_ptr.dtype.element_ty), mask=both)
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
    """Launch `scores` and `pool`.

    tokens [S0, E], features [B, S1, E], queries [B, R, E] of one dtype; feature_offset [B, R], bias [E], mask bool
    [B, S1]. The channel stride of tokens and features is 1, queries are contiguous. B, E and S0 + S1 are at least 1.
    """
    config = config or default_config(features.element_size(), token_query.shape[1])
    batch, s1, channels = features.shape
    s0, rows = tokens.shape[0], token_query.shape[1]
    acc = _accumulator(features.dtype)
    score = features.new_empty(batch, rows, s0 + s1, dtype=acc)
    out = Pooled(
        torch.empty_like(token_query),
        torch.empty_like(feature_query),
        features.new_empty(batch, rows, dtype=acc),
        score,
        features.new_empty(batch, rows, dtype=acc),
    )
    with torch.cuda.device_of(features):
        _launch_scores(
            tokens, features, token_query, feature_query, feature_offset, bias, silu, mask, score, None, None,
            precision, config,
        )  # fmt: skip
        pool[(triton.cdiv(channels, config.pool_channels), batch)](
            tokens, features, bias, score, out.token_sum, out.feature_sum, out.mass, out.lse,
            s0, s1, rows, channels, tokens.stride(0), features.stride(0), features.stride(1),
            SILU=silu, HAS_BIAS=bias is not None,
            BLOCK_R=_row_block(rows), BLOCK_S=config.pool_keys, BLOCK_E=config.pool_channels,
            BLOCK_N=config.statistics_keys, ACC=_triton_type(acc), PRECISION=precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
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
    """Launch `scores` with the gradients as queries, then `pool_grad`; the tokens' gradient is two matrix products.

    token_sum_grad and feature_sum_grad [B, R, E] contiguous in the features' dtype, mass_grad [B, R] contiguous.
    """
    config = config or default_config(features.element_size(), token_query.shape[1])
    batch, s1, channels = features.shape
    s0, rows = tokens.shape[0], token_query.shape[1]
    acc = pooled.scores.dtype
    scores_grad = torch.empty_like(pooled.scores)
    # without tokens nothing writes their half
    delta = (torch.empty if s0 else torch.zeros)(2, batch, rows, dtype=acc, device=features.device)
    token_p = features.new_empty(batch * rows, s0)
    token_ds = torch.empty_like(token_p)
    bias_grad = None if bias is None else features.new_empty(batch, channels, dtype=acc)
    out = PoolGrads(
        torch.empty_like(tokens),
        features.new_empty(batch, s1, channels),
        torch.empty_like(token_query),
        torch.empty_like(feature_query),
        features.new_empty(batch, rows, dtype=acc),
        bias_grad,
    )
    with torch.cuda.device_of(features):
        _launch_scores(
            tokens, features, token_sum_grad, feature_sum_grad, mass_grad, bias, silu, None, scores_grad, delta, pooled,
            precision, config,
        )  # fmt: skip
        pool_grad[(triton.cdiv(channels, config.pool_channels), batch)](
            tokens, features, bias, feature_query, feature_sum_grad,
            pooled.scores, scores_grad, pooled.lse, delta,
            out.features, out.token_query, out.feature_query, out.feature_offset, bias_grad, token_p, token_ds,
            batch, s0, s1, rows, channels, tokens.stride(0), features.stride(0), features.stride(1),
            SILU=silu, HAS_BIAS=bias is not None,
            BLOCK_R=_row_block(rows), BLOCK_S=config.pool_keys, BLOCK_E=config.pool_channels,
            ACC=_triton_type(acc), PRECISION=precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    tokens_grad = torch.mm(token_ds.t(), token_query.reshape(batch * rows, channels))
    tokens_grad.addmm_(token_p.t(), token_sum_grad.reshape(batch * rows, channels))
    return out._replace(tokens=tokens_grad, feature_bias=None if bias_grad is None else bias_grad.sum(0))


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
    delta: Tensor | None,
    pooled: Pooled | None,
    precision: str,
    config: PoolConfig,
) -> None:
    batch, s1, channels = features.shape
    s0, rows = tokens.shape[0], token_query.shape[1]
    token_blocks = triton.cdiv(s0, config.score_keys)
    token_sum, feature_sum, mass = (None, None, None) if pooled is None else pooled[:3]
    scores[(token_blocks + triton.cdiv(s1, config.score_keys), batch)](
        tokens, features, bias, token_query, feature_query, offset, mask, token_sum, feature_sum, mass, out, delta,
        batch, s0, s1, rows, channels, token_blocks, tokens.stride(0), features.stride(0), features.stride(1),
        SILU=silu, HAS_BIAS=bias is not None, HAS_OFFSET=offset is not None, HAS_MASK=mask is not None,
        WITH_DELTA=delta is not None,
        BLOCK_R=_row_block(rows), BLOCK_S=config.score_keys, BLOCK_E=config.score_channels,
        ACC=_triton_type(out.dtype), PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


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
    for element, rows, full in _SHIPPED:
        c = default_config(4 if element == "fp32" else 2, rows)
        x, acc, i = f"*{element}", "*fp32", "i32"
        flags = {"SILU": full, "HAS_BIAS": full}
        shared = {"BLOCK_R": _row_block(rows), "ACC": tl.float32, "PRECISION": "ieee"}
        optional = x if full else "constexpr"
        strides = dict.fromkeys(("token_stride", "sample_stride", "feature_stride"), i)
        sizes = dict.fromkeys(("s0", "s1", "rows", "channels"), i) | strides
        for backward in (False, True):
            saved = x if backward else "constexpr"
            pointers = {
                "tokens_ptr": x, "features_ptr": x, "bias_ptr": optional, "token_query_ptr": x,
                "feature_query_ptr": x, "offset_ptr": acc if full or backward else "constexpr",
                "mask_ptr": "*i1" if full and not backward else "constexpr",
                "token_sum_ptr": saved, "feature_sum_ptr": saved, "mass_ptr": acc if backward else "constexpr",
                "out_ptr": acc, "delta_ptr": acc if backward else "constexpr",
            }  # fmt: skip
            own = {
                "HAS_OFFSET": full or backward, "HAS_MASK": full and not backward, "WITH_DELTA": backward,
                "BLOCK_S": c.score_keys, "BLOCK_E": c.score_channels,
            }  # fmt: skip
            signature = pointers | {"batch": i, "token_blocks": i} | sizes
            found.append(_specialization(scores, signature, flags | own | shared, c))
        pointers = {
            "tokens_ptr": x, "features_ptr": x, "bias_ptr": optional, "scores_ptr": acc, "token_sum_ptr": x,
            "feature_sum_ptr": x, "mass_ptr": acc, "lse_ptr": acc,
        }  # fmt: skip
        own = {"BLOCK_S": c.pool_keys, "BLOCK_E": c.pool_channels}
        statistics = {"BLOCK_N": c.statistics_keys}
        found.append(_specialization(pool, pointers | sizes, flags | own | statistics | shared, c))
        pointers = {
            "tokens_ptr": x, "features_ptr": x, "bias_ptr": optional, "feature_query_ptr": x,
            "feature_sum_grad_ptr": x, "scores_ptr": acc, "scores_grad_ptr": acc, "lse_ptr": acc, "delta_ptr": acc,
            "features_grad_ptr": x, "token_query_grad_ptr": x, "feature_query_grad_ptr": x, "offset_grad_ptr": acc,
            "bias_grad_ptr": acc if full else "constexpr", "token_p_ptr": x, "token_ds_ptr": x, "batch": i,
        }  # fmt: skip
        found.append(_specialization(pool_grad, pointers | sizes, flags | own | shared, c))
    return tuple(found)


def _specialization(kernel, types: dict[str, str], constexprs: dict, config: PoolConfig) -> Specialization:
    """Arguments in the kernel's order; a pointer that is not given is a constexpr None, as in a launch."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    absent = {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constexprs}
    return Specialization(kernel, signature, constexprs | absent, config.num_warps, config.num_stages)


SPECIALIZATIONS = _specializations()
