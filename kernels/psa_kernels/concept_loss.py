"""Linear heads with one cross-entropy each: logits, losses and the gradient of the logits in one launch.

The classes are few (11 in the paper), the features wide (4096): one program multiplies a block of rows with all heads
and has every logit of its rows, so softmax, loss and gradient follow in registers. Up to 32 rows are one program, whose
sums are the losses. More rows are more programs and a second, tiny launch that adds their sums in a fixed order: a
"last program adds" counter would have to be zeroed first, which is a launch too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.launch import Specialization, float32_precision, next_power_of_2

MAX_CLASSES = 64
MAX_HEADS = 16

_LOG2E = tl.constexpr(1.4426950408889634)

# where a head's divisor comes from: the weights of its valid targets, one number, or a tensor
_FROM_TARGETS, _NUMBER, _TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _store_loss(total, share, losses, norms, num_items, items, stride_items, h, NORM: tl.constexpr):
    """Divide one head's sum, store it with its divisor, return it."""
    if NORM == _NUMBER:
        norm = (share * 0 + items).to(total.dtype)
    elif NORM == _TENSOR:
        norm = tl.load(num_items + h * stride_items).to(total.dtype)
    else:
        norm = share
    norm = tl.where(norm > 0, norm, 1)  # no valid target: the sum is 0 too
    tl.store(losses + h, total / norm)
    tl.store(norms + h, norm)
    return total / norm


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
    o_e = tl.arange(0, BLOCK_E)
    m_b, m_c = o_b < B, o_c < C

    p_x = pooled + o_b[:, None] * stride_pooled + o_e[None, :]
    p_w = weight + o_c[:, None].to(tl.int64) * stride_weight + o_e[None, :]
    b_s = tl.zeros([BLOCK_B, BLOCK_C], ACC)
    for i_e in range(0, E, BLOCK_E):
        m_e = i_e + o_e < E
        b_x = tl.load(p_x + i_e, mask=m_b[:, None] & m_e[None, :], other=0.0)
        b_w = tl.load(p_w + i_e, mask=m_c[:, None] & m_e[None, :], other=0.0)
        b_s = tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)), b_s, input_precision=PRECISION, out_dtype=ACC)
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
        if NEED_GRAD:
            b_g = b_p / b_z[:, None] * tl.sum(b_q, 1)[:, None] - b_q
            b_g = tl.where(wrong[:, None], float("nan"), b_g)
            b_d = tl.where(m_h[None, :] & valid[:, None], b_g, b_d)

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


def concept_loss_forward(
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    num_items: Tensor | None,
    items: float | None,
    head_sizes: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    need_grad: bool,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], losses [H], norms [H], logits [B, C] and their gradient [B, C] before the division by the norms.

    Args:
        pooled, weight, bias, targets: [B, E], [C, E], [C] or None, int64 [B, H].
        class_weights: [C] or None.
        num_items: the divisors as a tensor [] or [H]; `items`: as one number; neither: from the targets.
        head_sizes: classes of each head, at most MAX_HEADS heads and MAX_CLASSES classes.
        label_smoothing, ignore_index: as in F.cross_entropy.
        need_grad: False leaves the gradient empty ([0, C]).
        block_rows: rows of one program, a power of two from 16; default: all rows in one program, up to 32 of them in
            16-bit dtypes with at most 16 classes and 16 otherwise, where products or registers are dearer.
    """
    (b, e), c, heads = pooled.shape, weight.shape[0], len(head_sizes)
    pooled, weight = _rows(pooled), _rows(weight)
    wide = torch.promote_types(pooled.dtype, torch.float32)
    block_b = block_rows or min(max(next_power_of_2(b), 16), _most_rows(c, pooled.element_size()))
    programs = max(1, triton.cdiv(b, block_b))
    logits = pooled.new_empty(b, c)
    dlogits = pooled.new_empty(b if need_grad else 0, c, dtype=wide)
    loss, losses, norms = (pooled.new_empty(s, dtype=wide) for s in ((), heads, heads))
    partials = losses if programs == 1 else pooled.new_empty(programs, heads, 2, dtype=wide)
    norm_from = _TENSOR if num_items is not None else _NUMBER if items is not None else _FROM_TARGETS
    per_head = num_items is not None and num_items.dim() == 1
    stride_items = num_items.stride(0) if num_items is not None and per_head else 0
    items = 0.0 if items is None else float(items)
    with torch.cuda.device_of(pooled):  # Triton launches on the current one
        forward_kernel[(programs,)](
            pooled,
            weight,
            bias,
            targets,
            class_weights,
            num_items,
            logits,
            dlogits,
            loss,
            losses,
            norms,
            partials,
            items,
            b,
            e,
            pooled.stride(0),
            weight.stride(0),
            *targets.stride(),
            stride_items,
            STARTS=_starts(head_sizes),
            SMOOTHING=label_smoothing,
            IGNORE=ignore_index,
            NORM=norm_from.value,
            HAS_BIAS=bias is not None,
            HAS_WEIGHTS=class_weights is not None,
            NEED_GRAD=need_grad,
            SINGLE=programs == 1,
            ACC=_triton_dtype(wide),
            PRECISION=float32_precision(pooled.dtype),
            **_forward_config(block_b, c, pooled.element_size(), weight.element_size()),
        )
        if programs > 1:
            finish_kernel[(1,)](
                partials,
                num_items,
                loss,
                losses,
                norms,
                items,
                programs,
                stride_items,
                HEADS=heads,
                NORM=norm_from.value,
                ACC=_triton_dtype(wide),
                BLOCK=_FINISH_BLOCK,
                num_warps=1,
            )
    return loss, losses, norms, logits, dlogits


def concept_loss_backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits: Tensor | None,
    dlogits: Tensor,
    norms: Tensor,
    pooled: Tensor,
    weight: Tensor,
    head_sizes: Sequence[int],
    bias_dtype: torch.dtype,
    needs: Sequence[bool],
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pooled [B, E], weight [C, E] and bias [C] in one launch; an unneeded one (`needs`) is empty.

    One program has a block of columns and goes over all rows, so the sums over rows need no second step.
    """
    (b, e), c = pooled.shape, weight.shape[0]
    pooled, weight = _rows(pooled), _rows(weight)
    dpooled = pooled.new_empty(b if needs[0] else 0, e)
    dweight = weight.new_empty(c if needs[1] else 0, e)
    dbias = weight.new_empty(c if needs[2] else 0, dtype=bias_dtype)
    config = _backward_config(b, c, pooled.element_size())
    if block_rows:
        config["BLOCK_B"] = block_rows
    with torch.cuda.device_of(pooled):
        backward_kernel[(max(1, triton.cdiv(e, config["BLOCK_E"])),)](
            grad_loss,
            grad_losses,
            grad_logits,
            dlogits,
            norms,
            pooled,
            weight,
            dpooled,
            dweight,
            dbias,
            b,
            e,
            0 if grad_losses is None else grad_losses.stride(0),
            *((0, 0) if grad_logits is None else grad_logits.stride()),
            pooled.stride(0),
            weight.stride(0),
            STARTS=_starts(head_sizes),
            HAS_LOSS=grad_loss is not None,
            HAS_LOSSES=grad_losses is not None,
            HAS_LOGITS=grad_logits is not None,
            NEED_POOLED=needs[0],
            NEED_WEIGHT=needs[1],
            NEED_BIAS=needs[2],
            ACC=_triton_dtype(dlogits.dtype),
            # 16-bit features are exact in TF32, and the gradient of the logits keeps more digits in it than in their dtype
            PRECISION="tf32" if pooled.element_size() == 2 else float32_precision(pooled.dtype),
            **config,
        )
    return dpooled, dweight, dbias


_FINISH_BLOCK = 128


def _most_rows(classes: int, element_size: int) -> int:
    # 64 rows would use Blackwell's tcgen05 products, where Triton 3.6 fails to compile the reductions that follow
    return 32 if element_size == 2 and classes <= 16 else 16


def _forward_config(block_b: int, classes: int, element_size: int, weight_element_size: int) -> dict[str, int]:
    block_c = max(16, next_power_of_2(classes))
    # up to 16 KB of features and of weights for each stage: one program alone must keep its multiprocessor busy
    block_e = max(32, min(128, 16384 // max(element_size * block_b, weight_element_size * block_c)))
    warps = 2 if element_size == 2 and block_b * block_c <= 512 else 4  # four spill on sm_80 to sm_89
    return {"BLOCK_B": block_b, "BLOCK_C": block_c, "BLOCK_E": block_e, "num_warps": warps, "num_stages": 4}


def _backward_config(rows: int, classes: int, element_size: int) -> dict[str, int]:
    block_c = max(16, next_power_of_2(classes))
    block_b = min(max(next_power_of_2(rows), 16), 32 if element_size == 2 else 16)
    return {"BLOCK_B": block_b, "BLOCK_C": block_c, "BLOCK_E": 32, "num_warps": 4, "num_stages": 2}


def _starts(head_sizes: Sequence[int]) -> tuple[int, ...]:
    starts = [0]
    for size in head_sizes:
        starts.append(starts[-1] + size)
    return tuple(starts)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring columns; the rows may be anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _specializations() -> tuple[Specialization, ...]:
    """The paper's heads in each dtype, few and many rows, with every option and with none; and the most classes."""
    return (
        _forward_specialization("bf16", "bf16", 16, (7, 4), options=False, single=True),
        _forward_specialization("bf16", "fp32", 32, (7, 4), options=True, single=True),
        _forward_specialization("bf16", "bf16", 32, (7, 4), options=True, single=False),
        _forward_specialization("fp32", "fp32", 16, (7, 4), options=True, single=True),
        _forward_specialization("fp16", "fp32", 16, (50, MAX_CLASSES - 50), options=True, single=False),
        _backward_specialization("bf16", "fp32", (7, 4)),
        _backward_specialization("fp32", "fp32", (7, 4)),
        _backward_specialization("fp16", "fp32", (50, MAX_CLASSES - 50)),
        _specialization(
            finish_kernel,
            {"partials": "*fp32", "num_items": "*fp32", "items": "fp32", **_SUMS},
            {"HEADS": 2, "NORM": _TENSOR.value, "ACC": tl.float32, "BLOCK": _FINISH_BLOCK},
            {"num_warps": 1, "num_stages": 2},
        ),
    )


_SUMS = dict.fromkeys(("loss", "losses", "norms"), "*fp32")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _forward_specialization(
    x: str, w: str, rows: int, sizes: tuple[int, ...], options: bool, single: bool
) -> Specialization:
    types = {"pooled": f"*{x}", "weight": f"*{w}", "bias": f"*{w}", "targets": "*i64", "logits": f"*{x}"}
    types |= {"dlogits": "*fp32", "partials": "*fp32", "items": "fp32", **_SUMS}
    constants = {"STARTS": _starts(sizes), "SMOOTHING": 0.1 if options else 0.0, "IGNORE": -100, "SINGLE": single}
    constants |= {"HAS_BIAS": True, "HAS_WEIGHTS": options, "NEED_GRAD": True, "ACC": tl.float32, "PRECISION": "ieee"}
    if options:
        types |= {"class_weights": "*fp32", "num_items": "*fp32"}
        constants["NORM"] = _TENSOR.value
    else:
        constants |= {"class_weights": None, "num_items": None, "NORM": _FROM_TARGETS.value}
    config = _forward_config(rows, sum(sizes), _BYTES[x], _BYTES[w])
    return _specialization(forward_kernel, types, constants, config)


def _backward_specialization(x: str, w: str, sizes: tuple[int, ...]) -> Specialization:
    types = {"grad_loss": "*fp32", "grad_losses": "*fp32", "grad_logits": f"*{x}", "dlogits": "*fp32", "norms": "*fp32"}
    types |= {"pooled": f"*{x}", "weight": f"*{w}", "dpooled": f"*{x}", "dweight": f"*{w}", "dbias": f"*{w}"}
    flags = ("HAS_LOSS", "HAS_LOSSES", "HAS_LOGITS", "NEED_POOLED", "NEED_WEIGHT", "NEED_BIAS")
    precision = "ieee" if x == "fp32" else "tf32"
    constants = {"STARTS": _starts(sizes), "ACC": tl.float32, "PRECISION": precision, **dict.fromkeys(flags, True)}
    return _specialization(backward_kernel, types, constants, _backward_config(64, sum(sizes), _BYTES[x]))


def _specialization(kernel, types: dict[str, str], constants: dict, config: dict) -> Specialization:
    constants = constants | {k: v for k, v in config.items() if k.startswith("BLOCK")}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    return Specialization(kernel, signature, constants, config["num_warps"], config["num_stages"])


SPECIALIZATIONS = _specializations()
