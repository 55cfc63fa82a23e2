"""Device code of the two-segment attention pool; `psa_kernels.concept_pool` launches it and says what it computes."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from psa_kernels.launch import interpreted

# the interpreter has no libdevice
_LIBDEVICE = tl.constexpr(not interpreted())

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _activate(x, bias_ptr, channel, channels, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """x [keys, channels] in ACC, plus bias; returns (act(x), d act / dx)."""
    narrow: tl.constexpr = x.dtype.primitive_bitwidth == 16
    x = x.to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACC)[None, :]
    slope = tl.full(x.shape, 1.0, ACC)
    if SILU:
        # "/" and tl.exp take care of divisors beyond 2**126 and of subnormal numbers, which a sigmoid does not need;
        # fast_expf also loses some ulp of fp32 (25 at x = -20), which a rounding to 16 bits hides
        if _LIBDEVICE:
            gate = libdevice.fast_dividef(1.0, 1.0 + (libdevice.fast_expf(-x) if narrow else tl.exp(-x)))
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
def _token_sum(
    tokens_ptr, weights_ptr, s0, row_ok, channel, ok, token_stride,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights . tokens [BLOCK_R, BLOCK_E] of pointers to rows of weights [BLOCK_R, 1]."""
    lane = tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_R, BLOCK_E], dtype=ACC)
    for start in range(0, s0, BLOCK_S):
        key = start + lane
        key_ok = key < s0
        weights = tl.load(weights_ptr + key[None, :], mask=row_ok[:, None] & key_ok[None, :], other=0.0)
        x = tl.load(
            tokens_ptr + key.to(tl.int64)[:, None] * token_stride + channel[None, :],
            mask=key_ok[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(weights, x, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


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

    acc = _token_sum(
        tokens_ptr, p_rows, s0, row_ok, channel, ok, token_stride, BLOCK_R, BLOCK_S, BLOCK_E, ACC, PRECISION
    )
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
    bias_grad = tl.zeros([BLOCK_S, BLOCK_E], dtype=ACC)
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
            bias_grad += grad  # 0 outside, as p and ds are
        tl.store(
            features_grad_ptr + (sample * s1 + here) * channels + channel[None, :],
            grad.to(features_grad_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
    tl.store(feature_query_grad_ptr + place, query_grad.to(feature_query_grad_ptr.dtype.element_ty), mask=place_ok)
    if HAS_BIAS:
        tl.store(bias_grad_ptr + sample * channels + channel, tl.sum(bias_grad, 0), mask=ok)

    query_grad = _token_sum(
        tokens_ptr, ds_ptr + weight_rows, s0, row_ok, channel, ok, token_stride,
        BLOCK_R, BLOCK_S, BLOCK_E, ACC, PRECISION,
    )  # fmt: skip
    tl.store(token_query_grad_ptr + place, query_grad.to(token_query_grad_ptr.dtype.element_ty), mask=place_ok)
