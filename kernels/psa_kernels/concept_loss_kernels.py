"""Device code of the concept heads' loss; `psa_kernels.concept_loss` launches it and says what it computes."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)

# where a head's divisor comes from: the weights of its valid targets, one number, or a tensor
FROM_TARGETS, NUMBER, TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _store_loss(total, share, losses, norms, num_items, items, stride_items, h, NORM: tl.constexpr):
    """Divide one head's sum, store it with its divisor, return it."""
    if NORM == NUMBER:
        norm = (share * 0 + items).to(total.dtype)
    elif NORM == TENSOR:
        norm = tl.load(num_items + h * stride_items).to(total.dtype)
    else:
        norm = share
    norm = tl.where(norm > 0, norm, 1)  # no valid target: the sum is 0 too
    tl.store(losses + h, total / norm)
    tl.store(norms + h, norm)
    return total / norm


@triton.jit
def _product(
    pooled,
    weight,
    o_b,
    o_c,
    m_b,
    m_c,
    E,
    stride_pooled,
    stride_weight,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows times the heads' weights: [BLOCK_B, BLOCK_C]."""
    o_e = tl.arange(0, BLOCK_E)
    p_x = pooled + o_b[:, None] * stride_pooled + o_e[None, :]
    p_w = weight + o_c[:, None].to(tl.int64) * stride_weight + o_e[None, :]
    b_s = tl.zeros([BLOCK_B, BLOCK_C], ACC)
    for i_e in range(0, E, BLOCK_E):
        m_e = i_e + o_e < E
        b_x = tl.load(p_x + i_e, mask=m_b[:, None] & m_e[None, :], other=0.0)
        b_w = tl.load(p_w + i_e, mask=m_c[:, None] & m_e[None, :], other=0.0)
        b_s = tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)), b_s, input_precision=PRECISION, out_dtype=ACC)
    return b_s


@triton.jit
def _head(
    b_s,  # [BLOCK_B, BLOCK_C], logits of all heads
    b_t,  # [BLOCK_B]
    b_cw,  # [1, BLOCK_C]
    o_c,
    m_h,  # [BLOCK_C], the head's columns
    h: tl.constexpr,
    STARTS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
):
    """One head's rows: their losses, their shares of the divisor, and the logits' gradient in the head's columns."""
    valid = b_t != IGNORE
    wrong = valid & ((b_t < 0) | (b_t >= STARTS[h + 1] - STARTS[h]))
    is_target = (o_c[None, :] == (b_t + STARTS[h])[:, None]) & m_h[None, :]

    b_h = tl.where(m_h[None, :], b_s, float("-inf"))
    b_max = tl.max(b_h, 1)
    b_p = tl.exp2((b_h - b_max[:, None]) * _LOG2E)
    b_z = tl.sum(b_p, 1)
    b_logp = b_s - (b_max + tl.log(b_z))[:, None]

    # the loss of a row is -sum_c q_c log p_c
    b_q = tl.where(is_target, (1 - SMOOTHING) * b_cw, 0.0)
    if SMOOTHING > 0:
        b_q += tl.where(m_h[None, :], SMOOTHING / (STARTS[h + 1] - STARTS[h]) * b_cw, 0.0)
    b_row = tl.where(valid, -tl.sum(tl.where(b_q != 0, b_q * b_logp, 0.0), 1), 0.0)
    b_row = tl.where(wrong, float("nan"), b_row)
    b_share = tl.where(valid, tl.sum(tl.where(is_target, b_cw, 0.0), 1), 0.0)
    b_g = b_p / b_z[:, None] * tl.sum(b_q, 1)[:, None] - b_q
    b_g = tl.where(wrong[:, None], float("nan"), b_g)
    return b_row, b_share, b_g


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    pooled,  # [B, E]
    weight,  # [C, E]
    bias,  # [C]
    targets,  # [B, H]
    class_weights,  # [C]
    num_items,  # [1] or [H]
    logits,  # [B, C]
    dlogits,  # [B, C], not divided by the norms
    loss,  # []
    losses,  # [H]
    norms,  # [H]
    partials,  # [programs, H, 2]
    items,
    B,
    E,
    stride_pooled,
    stride_weight,
    stride_targets_b,
    stride_targets_h,
    stride_items,
    STARTS: tl.constexpr,  # first column of each head, then C
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    SINGLE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: the logits, losses and gradients of BLOCK_B rows. SINGLE: of all rows, and the divided sums."""
    HEADS: tl.constexpr = len(STARTS) - 1
    C: tl.constexpr = STARTS[HEADS]
    i_b = tl.program_id(0)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_b, m_c = o_b < B, o_c < C
    b_s = _product(
        pooled, weight, o_b, o_c, m_b, m_c, E, stride_pooled, stride_weight,
        ACC, PRECISION, BLOCK_B, BLOCK_C, BLOCK_E,
    )  # fmt: skip
    if HAS_BIAS:
        b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(pooled.dtype.element_ty)
        b_s += b_bias[None, :].to(ACC)
    # the loss is that of the logits as returned, rounded to their dtype
    b_logits = b_s.to(logits.dtype.element_ty)
    o_bc = o_b[:, None] * C + o_c[None, :]
    m_bc = m_b[:, None] & m_c[None, :]
    tl.store(logits + o_bc, b_logits, mask=m_bc)
    b_s = b_logits.to(ACC)

    if HAS_WEIGHTS:
        b_cw = tl.load(class_weights + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    else:
        b_cw = tl.full([1, BLOCK_C], 1.0, ACC)
    b_d = tl.zeros([BLOCK_B, BLOCK_C], ACC)
    total_loss = tl.sum(tl.zeros([BLOCK_B], ACC), 0)
    for h in tl.static_range(HEADS):
        m_h = (o_c >= STARTS[h]) & (o_c < STARTS[h + 1])
        b_t = tl.load(targets + o_b * stride_targets_b + h * stride_targets_h, mask=m_b, other=IGNORE).to(tl.int64)
        b_row, b_share, b_g = _head(b_s, b_t, b_cw, o_c, m_h, h, STARTS, SMOOTHING, IGNORE)
        if NEED_GRAD:
            b_d = tl.where(m_h[None, :] & (b_t != IGNORE)[:, None], b_g, b_d)

        total, share = tl.sum(b_row, 0), tl.sum(b_share, 0)
        if SINGLE:
            total_loss += _store_loss(total, share, losses, norms, num_items, items, stride_items, h, NORM)
        else:
            p_part = partials + (i_b.to(tl.int64) * HEADS + h) * 2
            tl.store(p_part, total)
            tl.store(p_part + 1, share)
    if NEED_GRAD:
        tl.store(dlogits + o_bc, b_d, mask=m_bc)
    if SINGLE:
        tl.store(loss, total_loss)


@triton.jit(do_not_specialize=["programs"])
def finish_kernel(
    partials,  # [programs, H, 2]
    num_items,
    loss,
    losses,
    norms,
    items,
    programs,
    stride_items,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the sums of all programs of the forward kernel."""
    o_p = tl.arange(0, BLOCK).to(tl.int64)
    total_loss = tl.sum(tl.zeros([BLOCK], ACC), 0)
    for h in tl.static_range(HEADS):
        b_total, b_share = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
        for i_p in range(0, programs, BLOCK):
            p_part = partials + ((i_p + o_p) * HEADS + h) * 2
            b_total += tl.load(p_part, mask=i_p + o_p < programs, other=0.0)
            b_share += tl.load(p_part + 1, mask=i_p + o_p < programs, other=0.0)
        total, share = tl.sum(b_total, 0), tl.sum(b_share, 0)
        total_loss += _store_loss(total, share, losses, norms, num_items, items, stride_items, h, NORM)
    tl.store(loss, total_loss)


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    grad_loss,  # []
    grad_losses,  # [H]
    grad_logits,  # [B, C]
    dlogits,  # [B, C]
    norms,  # [H]
    pooled,  # [B, E]
    weight,  # [C, E]
    dpooled,  # [B, E]
    dweight,  # [C, E]
    dbias,  # [C]
    B,
    E,
    stride_losses,
    stride_logits_b,
    stride_logits_c,
    stride_pooled,
    stride_weight,
    STARTS: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_LOSSES: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    NEED_POOLED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: BLOCK_E columns of the gradients of pooled and weight, all rows; the first also the bias's."""
    HEADS: tl.constexpr = len(STARTS) - 1
    C: tl.constexpr = STARTS[HEADS]
    i_e = tl.program_id(0)
    o_e = (i_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_e, m_c = o_e < E, o_c < C
    o_ce = o_c[:, None].to(tl.int64) * stride_weight + o_e[None, :]
    m_ce = m_c[:, None] & m_e[None, :]

    b_scale = tl.zeros([BLOCK_C], ACC)  # of each column: the gradient of its head's loss over the head's divisor
    for h in tl.static_range(HEADS):
        g = tl.sum(tl.zeros([BLOCK_C], ACC), 0)
        if HAS_LOSS:
            g += tl.load(grad_loss).to(ACC)
        if HAS_LOSSES:
            g += tl.load(grad_losses + h * stride_losses).to(ACC)
        m_h = (o_c >= STARTS[h]) & (o_c < STARTS[h + 1])
        b_scale = tl.where(m_h, g / tl.load(norms + h), b_scale)

    if NEED_POOLED:
        # rounded to the features' dtype, as in the forward product
        b_w = tl.load(weight + o_ce, mask=m_ce, other=0.0).to(pooled.dtype.element_ty).to(ACC)
    b_dw = tl.zeros([BLOCK_C, BLOCK_E], ACC)
    b_db = tl.zeros([BLOCK_C], ACC)
    for i_b in range(0, B, BLOCK_B):
        o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)
        m_b = o_b < B
        m_bc = m_b[:, None] & m_c[None, :]
        b_d = tl.zeros([BLOCK_B, BLOCK_C], ACC)
        if HAS_LOSS or HAS_LOSSES:
            b_d += tl.load(dlogits + o_b[:, None] * C + o_c[None, :], mask=m_bc, other=0.0) * b_scale[None, :]
        if HAS_LOGITS:
            p_g = grad_logits + o_b[:, None] * stride_logits_b + o_c[None, :].to(tl.int64) * stride_logits_c
            b_d += tl.load(p_g, mask=m_bc, other=0.0).to(ACC)
        m_be = m_b[:, None] & m_e[None, :]
        if NEED_POOLED:
            b_dx = tl.dot(b_d, b_w, input_precision=PRECISION, out_dtype=ACC)
            tl.store(dpooled + o_b[:, None] * E + o_e[None, :], b_dx.to(dpooled.dtype.element_ty), mask=m_be)
        if NEED_WEIGHT:
            b_x = tl.load(pooled + o_b[:, None] * stride_pooled + o_e[None, :], mask=m_be, other=0.0).to(ACC)
            b_dw = tl.dot(tl.trans(b_d), b_x, b_dw, input_precision=PRECISION, out_dtype=ACC)
        if NEED_BIAS:
            b_db += tl.sum(b_d, 0)
    if NEED_WEIGHT:
        p_dw = dweight + o_c[:, None].to(tl.int64) * E + o_e[None, :]
        tl.store(p_dw, b_dw.to(dweight.dtype.element_ty), mask=m_ce)
    if NEED_BIAS and i_e == 0:
        tl.store(dbias + o_c, b_db.to(dbias.dtype.element_ty), mask=m_c)
