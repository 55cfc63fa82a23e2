"""Softmax cross-entropy of rows of logits: the loss, and the gradient written in place of the logits.

One program per row, two walks over the vocabulary in blocks. The first keeps a running maximum and sum (online
logsumexp), the second turns each logit into its gradient, from L2 as long as the rows under way fit into it. The row is
never held whole, so the vocabulary has no upper bound, and it needs no particular divisor: rows are read and written
over their padded width, whose divisor makes the accesses vectors, and the columns beyond the vocabulary count as -inf.
Nothing is shared between rows: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.launch import Specialization, next_power_of_2

# 16 logits a thread, two 16-byte loads in bf16; in fp64 that many would spill
BLOCK_V, BLOCK_V_FP64, NUM_WARPS = 4096, 1024, 8


# the vocabulary stands in comparisons only: no compilation of its own for 1, or for a multiple of 16
@triton.jit(do_not_specialize=["V"])
def cross_entropy_rows_kernel(
    logits_ptr,  # [R, P], rows `stride_r` apart
    bias_ptr,  # [P] or None
    labels_ptr,  # [R]
    weights_ptr,  # [R] or None
    loss_ptr,  # [R]
    V,
    P,
    stride_r,
    WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid [R]. Accumulates in ACC."""
    LOG2E: tl.constexpr = 1.4426950408889634
    i_r = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + i_r * stride_r
    label = tl.load(labels_ptr + i_r)
    m_label = (label >= 0) & (label < V)

    # read before the second walk overwrites it
    b_target = tl.load(p_row + label, mask=m_label, other=0.0).to(ACC)
    if bias_ptr is not None:
        b_target += tl.load(bias_ptr + label, mask=m_label, other=0.0).to(ACC)

    # once here rather than as a tl.where in both walks, which would take registers (45 instead of 32 in bf16)
    if V < P:
        for i_p in range(V, P, 64):
            o_p = i_p + tl.arange(0, 64)
            tl.store(p_row + o_p, float("-inf"), mask=o_p < P)
        tl.debug_barrier()  # other threads read what this one stored

    b_max = tl.full((), float("-inf"), ACC)
    b_sum = tl.full((), 0.0, ACC)
    for i_v in range(0, P, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < P
        b_x = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(ACC)
        if bias_ptr is not None:
            b_x += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(ACC)
        b_new = tl.maximum(b_max, tl.max(b_x, 0))
        # while every logit so far is -inf (a masked part of the vocabulary), -inf - -inf must not arise
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2((b_max - b_shift) * LOG2E) + tl.sum(tl.exp2((b_x - b_shift) * LOG2E), 0)
        b_max = b_new
    b_lse = b_max + tl.log(b_sum)

    b_weight = tl.full((), 1.0, ACC)
    if weights_ptr is not None:
        b_weight = tl.load(weights_ptr + i_r).to(ACC)
    # a label outside the vocabulary must not pass for a loss: NaN, in the gradient too
    b_weight = tl.where(m_label, b_weight, float("nan"))
    tl.store(loss_ptr + i_r, (b_lse - b_target) * b_weight)

    if WRITE_GRAD:
        for i_v in range(0, P, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            m_v = o_v < P
            b_x = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(ACC)
            if bias_ptr is not None:
                b_x += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(ACC)
            b_p = tl.exp2((b_x - b_lse) * LOG2E)
            b_g = (b_p - tl.where(o_v == label, 1.0, 0.0)) * b_weight
            tl.store(p_row + o_v, b_g.to(logits_ptr.dtype.element_ty), mask=m_v)


def cross_entropy_rows_(
    logits: Tensor,
    vocabulary: int,
    labels: Tensor,
    loss: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    write_grad: bool = True,
    block_v: int | None = None,
    num_warps: int | None = None,
) -> None:
    """weight * (logsumexp(logits + bias) - (logits + bias)[label]) of each row; its gradient replaces the logits.

    Args:
        logits: [R, P] fp16, bf16, fp32 or fp64, unit stride along P, P >= V. Overwritten; left alone without
            `write_grad`. Accesses are vectors where P and the rows' stride are multiples of 16, whatever V is.
        vocabulary: V. What stands in the columns beyond it is of no account before, and nothing to be read after.
        labels: int64 [R], contiguous. Outside 0..V-1: loss and gradient of the row are NaN.
        loss: [R], contiguous, filled. Its dtype, fp32 (fp64 for fp64 logits), is what everything is accumulated in.
        bias: [P] contiguous or None, finite beyond the vocabulary; added in the accumulator's dtype.
        weights: [R] contiguous or None, a factor on each row's loss and gradient.
        write_grad: whether the gradient is wanted.
        block_v, num_warps: overrides of the block of the vocabulary (a power of two) and of the warps a row gets.
    """
    rows, padded = logits.shape
    double = logits.dtype == torch.float64
    assert logits.stride(1) == 1 or padded == 1
    assert 0 < vocabulary <= padded or rows == 0
    assert bias is None or bias.shape == (padded,)
    assert labels.shape == loss.shape == (rows,)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert all(t is None or t.is_contiguous() for t in (labels, loss, bias, weights))
    if rows == 0:
        return
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        cross_entropy_rows_kernel[(rows,)](
            logits_ptr=logits,
            bias_ptr=bias,
            labels_ptr=labels,
            weights_ptr=weights,
            loss_ptr=loss,
            V=vocabulary,
            P=padded,
            stride_r=logits.stride(0),
            WRITE_GRAD=write_grad,
            BLOCK_V=block_v or min(BLOCK_V_FP64 if double else BLOCK_V, next_power_of_2(padded)),
            ACC=tl.float64 if double else tl.float32,
            num_warps=num_warps or NUM_WARPS,
        )


def _specialization(dtype: str, optional: bool, write_grad: bool) -> Specialization:
    wide, acc, block = ("fp64", tl.float64, BLOCK_V_FP64) if dtype == "fp64" else ("fp32", tl.float32, BLOCK_V)
    signature = {
        "logits_ptr": f"*{dtype}",
        "bias_ptr": f"*{wide}" if optional else "constexpr",
        "labels_ptr": "*i64",
        "weights_ptr": f"*{wide}" if optional else "constexpr",
        "loss_ptr": f"*{wide}",
        "V": "i32",
        "P": "i32",
        "stride_r": "i32",
        "WRITE_GRAD": "constexpr",
        "BLOCK_V": "constexpr",
        "ACC": "constexpr",
    }
    constexprs = {"WRITE_GRAD": write_grad, "BLOCK_V": block, "ACC": acc}
    if not optional:
        constexprs |= {"bias_ptr": None, "weights_ptr": None}
    return Specialization(cross_entropy_rows_kernel, signature, constexprs, num_warps=NUM_WARPS)


# bias and weights both or neither: one of them alone is code between the two, as a call without gradient is
SPECIALIZATIONS: tuple[Specialization, ...] = (
    *(_specialization("bf16", *options) for options in ((False, True), (True, True), (True, False))),
    *(_specialization(dtype, True, True) for dtype in ("fp16", "fp32", "fp64")),
)
