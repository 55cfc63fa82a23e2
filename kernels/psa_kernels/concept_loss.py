"""Linear heads with one cross-entropy each: logits, losses and the gradient of the logits in one launch.

The classes are few (11 in the paper), the features wide (4096): one program multiplies a block of rows with all heads
and has every logit of its rows, so softmax, loss and gradient follow in registers. Up to 32 rows are one program, whose
sums are the losses. More rows are more programs and a second, tiny launch that adds their sums in a fixed order: a
"last program adds" counter would have to be zeroed first, which is a launch too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.concept_loss_kernels import (
    FROM_TARGETS,
    NUMBER,
    TENSOR,
    backward_kernel,
    finish_kernel,
    forward_kernel,
)
from psa_kernels.launch import Specialization, accumulator, float32_precision, next_power_of_2, triton_dtype

MAX_CLASSES = 64
MAX_HEADS = 16


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
    wide = accumulator(pooled.dtype)
    block_b = block_rows or min(max(next_power_of_2(b), 16), _most_rows(c, pooled.element_size()))
    programs = max(1, triton.cdiv(b, block_b))
    logits = pooled.new_empty(b, c)
    dlogits = pooled.new_empty(b if need_grad else 0, c, dtype=wide)
    loss, losses, norms = (pooled.new_empty(s, dtype=wide) for s in ((), heads, heads))
    partials = losses if programs == 1 else pooled.new_empty(programs, heads, 2, dtype=wide)
    # what both kernels are told of the divisors and the sums
    sums = {"loss": loss, "losses": losses, "norms": norms, "partials": partials, "ACC": triton_dtype(wide)}
    sums |= _divisors(num_items, items)
    with torch.cuda.device_of(pooled):  # Triton launches on the current one
        forward_kernel[(programs,)](
            pooled=pooled,
            weight=weight,
            bias=bias,
            targets=targets,
            class_weights=class_weights,
            logits=logits,
            dlogits=dlogits,
            B=b,
            E=e,
            stride_pooled=pooled.stride(0),
            stride_weight=weight.stride(0),
            stride_targets_b=targets.stride(0),
            stride_targets_h=targets.stride(1),
            STARTS=_starts(head_sizes),
            SMOOTHING=label_smoothing,
            IGNORE=ignore_index,
            HAS_BIAS=bias is not None,
            HAS_WEIGHTS=class_weights is not None,
            NEED_GRAD=need_grad,
            SINGLE=programs == 1,
            PRECISION=float32_precision(pooled.dtype),
            **sums,
            **_forward_config(block_b, c, pooled.element_size(), weight.element_size()),
        )
        if programs > 1:
            finish_kernel[(1,)](programs=programs, HEADS=heads, BLOCK=_FINISH_BLOCK, num_warps=1, **sums)
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
            grad_loss=grad_loss,
            grad_losses=grad_losses,
            grad_logits=grad_logits,
            dlogits=dlogits,
            norms=norms,
            pooled=pooled,
            weight=weight,
            dpooled=dpooled,
            dweight=dweight,
            dbias=dbias,
            B=b,
            E=e,
            stride_losses=0 if grad_losses is None else grad_losses.stride(0),
            stride_logits_b=0 if grad_logits is None else grad_logits.stride(0),
            stride_logits_c=0 if grad_logits is None else grad_logits.stride(1),
            stride_pooled=pooled.stride(0),
            stride_weight=weight.stride(0),
            STARTS=_starts(head_sizes),
            HAS_LOSS=grad_loss is not None,
            HAS_LOSSES=grad_losses is not None,
            HAS_LOGITS=grad_logits is not None,
            NEED_POOLED=needs[0],
            NEED_WEIGHT=needs[1],
            NEED_BIAS=needs[2],
            ACC=triton_dtype(dlogits.dtype),
            # 16-bit features are exact in TF32, and the logits' gradient keeps more digits in it than in their dtype
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


def _divisors(num_items: Tensor | None, items: float | None) -> dict[str, Any]:
    """The kernels' arguments that say what each head's sum is divided by."""
    norm_from = TENSOR if num_items is not None else NUMBER if items is not None else FROM_TARGETS
    return {
        "num_items": num_items,
        "items": 0.0 if items is None else float(items),
        "stride_items": num_items.stride(0) if num_items is not None and num_items.dim() == 1 else 0,
        "NORM": norm_from.value,
    }


def _starts(head_sizes: Sequence[int]) -> tuple[int, ...]:
    starts = [0]
    for size in head_sizes:
        starts.append(starts[-1] + size)
    return tuple(starts)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring columns; the rows may be anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


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
            {"HEADS": 2, "NORM": TENSOR.value, "ACC": tl.float32, "BLOCK": _FINISH_BLOCK},
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
        constants["NORM"] = TENSOR.value
    else:
        constants |= {"class_weights": None, "num_items": None, "NORM": FROM_TARGETS.value}
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
