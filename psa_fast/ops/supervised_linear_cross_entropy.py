"""Cross-entropy of a linear LM head on the supervised rows only, without ever holding all logits.

In a VLM batch 70 to 95 percent of the rows (image, prompt, padding) carry no label. Those never meet the head, the rest
does in chunks, and each chunk's gradient replaces its logits while they are at hand. See
docs/ops/supervised_linear_cross_entropy.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_fast.compat.torch import graph_is_kept, is_fake
from psa_fast.ops.backend import Backend, resolve
from psa_fast.ops.limits import no_forward_mode, once, same_device
from psa_fast.ops.precision import at_least_fp32

_NAME = "supervised_linear_cross_entropy"
# fewer rows, and reading the head's weight (on a CPU: packing it anew for each product) shows
_MIN_CHUNK_ROWS, _MIN_CHUNK_ROWS_CPU = 256, 512
_MAX_CHUNK_ELEMENTS = 1 << 26  # logits: 128 MB in bf16
_TILE_ELEMENTS = 1 << 22  # logits the torch path turns into gradients at once, 16 MB in fp32: they stay in cache
_MAX_ROUNDED_CHUNKS = 4  # partial sums of the weight's gradient that may be rounded to 16 bits


def supervised_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean (or sum / num_items) over supervised rows of token_weight * CE(hidden @ weight.T + bias, label).

    Args:
        hidden: [..., E].
        weight: [V, E].
        labels: int64 [...], ALREADY ALIGNED with `hidden`: for next-token prediction the caller shifts.
        bias: [V] or None.
        ignore_index: label of a row that is left out.
        token_weights: [...], a factor for each row's loss; not differentiated and not part of the divisor.
        num_items: divide the sum by this number or 0-dim tensor instead of by the number of supervised rows of this
            call, as for a batch that is spread over ranks or accumulation steps.
        backend: of the row-wise part; the products are torch's. "auto": Triton on CUDA, torch elsewhere.

    Returns:
        Scalar in fp32 at least. No supervised row: 0, connected to the graph. Products are computed in the dtype of
        `hidden` (the weight is cast to it), bias, logsumexp and loss in fp32 at least, whatever autocast says. The
        gradient of `weight` and `bias` is computed only where they require it.

    Raises:
        ValueError: shapes that do not fit together, two devices, labels that are not int64, on a CPU also labels
            outside 0..V-1 that are not `ignore_index`. On CUDA, where looking would be a synchronisation, such a label
            makes loss and gradient NaN (Triton) or fails torch's device-side assertion (torch).
        NotImplementedError: under forward-mode differentiation; in a second backward through the gradients.
    """
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [..., E] and [V, E]")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} must have hidden's shape {tuple(hidden.shape)} without E")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights {tuple(token_weights.shape)} and labels {tuple(labels.shape)} must agree")
    same_device(_NAME, hidden=hidden, weight=weight, labels=labels, bias=bias, token_weights=token_weights)
    if isinstance(num_items, Tensor) and num_items.device.type != "cpu":
        same_device(_NAME, hidden=hidden, num_items=num_items)
    no_forward_mode(_NAME, hidden, weight, bias)
    train = torch.is_grad_enabled()
    needs = [train and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if token_weights is not None:
        token_weights = token_weights.detach()
    divisor: float | Tensor
    if torch.compiler.is_compiling() or hidden.is_meta or is_fake(hidden):  # no data to look at
        total, divisor, *_ = _compiled(hidden, weight, bias, labels, token_weights, ignore_index, backend, *needs)
    else:
        total, divisor = _Eager.apply(hidden, weight, bias, labels, token_weights, ignore_index, backend, *needs)
    if num_items is not None:
        divisor = num_items
    # 0 items anywhere: the sum is 0 too. The divisor's place is outside: in fp16 a gradient that is divided by a large
    # count before the incoming (scaled) gradient meets it would underflow
    if isinstance(divisor, Tensor):
        return total / divisor.where(divisor > 0, 1).to(total.dtype)
    return total / (divisor if divisor > 0 else 1)


class _Sums(NamedTuple):
    """What one call computes: the summed loss, and gradients of that sum (None where not needed)."""

    loss: Tensor  # [], fp32 at least
    rows: Tensor  # int64 [K], the supervised rows
    hidden: Tensor | None  # [K, E]
    weight: Tensor | None  # [V, E]
    bias: Tensor | None  # [V], fp32 at least


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> _Sums:
    dtype, wide = hidden.dtype, at_least_fp32(hidden.dtype)
    kernel = resolve(backend, hidden) == "triton"  # type: ignore[arg-type]
    rows_ = _triton_rows_() if kernel else _torch_rows_
    (vocabulary, width), train = weight.shape, need_hidden or need_weight or need_bias
    with torch.autocast(hidden.device.type, enabled=False):
        flat_labels = labels.reshape(-1)
        rows = (flat_labels != ignore_index).nonzero().squeeze(1)  # the only device synchronisation
        count = rows.shape[0]
        if hidden.is_contiguous() or hidden.dim() < 3:
            h = hidden.reshape(labels.numel(), width).index_select(0, rows)
        else:  # flattening would copy every row
            h = hidden[_unravel(rows, labels.shape)]
        y = flat_labels.index_select(0, rows)
        if y.device.type == "cpu" and count and (y.min() < 0 or y.max() >= vocabulary):
            raise ValueError(
                f"labels must be in 0..{vocabulary - 1} or {ignore_index} (ignored), "
                f"the others range from {y.min()} to {y.max()}"
            )
        scale = None if token_weights is None else token_weights.reshape(-1).index_select(0, rows).to(wide)
        w = weight.to(dtype)
        # rows of an odd vocabulary would leave the products and the row kernel without aligned loads
        padded = math.ceil(vocabulary / 64) * 64
        b = None if bias is None else bias.to(wide).contiguous()
        if b is not None and kernel:
            b = F.pad(b, (0, padded - vocabulary))

        least = _MIN_CHUNK_ROWS_CPU if hidden.device.type == "cpu" else _MIN_CHUNK_ROWS
        step = _chunk_rows(labels.numel(), count, vocabulary, width, least)
        buffer = h.new_empty(min(step, count), padded)
        if not kernel:
            # a CPU's bf16 product reads padded rows to their end, and nothing times NaN is NaN
            buffer[:, vocabulary:] = 0
        row_loss = h.new_empty(count, dtype=wide)
        weight_sum = _WeightSum(weight, dtype, wide, math.ceil(count / step)) if need_weight else None
        d_bias = h.new_zeros(vocabulary, dtype=wide) if need_bias else None
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            rows_of_chunk = buffer[: part.stop - start]
            logits = rows_of_chunk[:, :vocabulary]
            torch.mm(h[part], w.t(), out=logits)
            weights = None if scale is None else scale[part]
            rows_(rows_of_chunk, vocabulary, y[part], row_loss[part], bias=b, weights=weights, write_grad=train)
            if weight_sum is not None:
                weight_sum.add(logits, h[part])
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=wide)
            if need_hidden:
                torch.mm(logits, w, out=h[part])  # the chunk's hidden states are not needed again
        d_weight = None if weight_sum is None else weight_sum.result(hidden)
        return _Sums(row_loss.sum(), rows, h if need_hidden else None, d_weight, d_bias)


def _chunk_rows(total_rows: int, supervised: int, vocabulary: int, width: int, least: int) -> int:
    """Rows per chunk: even chunks whose logits take no more than hidden's gradient, allocated in backward anyway."""
    most = max(least, total_rows * width // max(1, vocabulary))
    most = max(1, min(most, _MAX_CHUNK_ELEMENTS // max(1, vocabulary)))
    if most > 128:  # whole tiles of the products, aligned rows of the row kernel
        most -= most % 128
    even = math.ceil(supervised / max(1, math.ceil(supervised / most)))
    return max(1, min(most, math.ceil(even / 128) * 128))


def _unravel(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Flat indices -> one index per dimension. torch.unravel_index copies from the host, a synchronisation."""
    index = []
    for size in reversed(shape):
        index.append(rows % size)
        rows = rows // size
    return tuple(reversed(index))


def _triton_rows_():
    from psa_kernels.supervised_linear_cross_entropy import cross_entropy_rows_

    return cross_entropy_rows_


def _torch_rows_(
    logits: Tensor,
    vocabulary: int,
    labels: Tensor,
    loss: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    write_grad: bool = True,
) -> None:
    """psa_kernels' cross_entropy_rows_ in plain torch: fills `loss` [R], replaces `logits` [R, P] by their gradient.

    The columns beyond the vocabulary are neither read nor written. 16-bit logits are widened a few rows at a time; in
    fp32 and fp64 everything happens in place.
    """
    step = max(1, _TILE_ELEMENTS // max(1, vocabulary))
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        tile = logits[part, :vocabulary]
        x = tile.to(loss.dtype)
        if bias is not None:
            x += bias
        target = labels[part].unsqueeze(1)
        picked = x.gather(1, target)
        top = x.amax(1, keepdim=True)
        total = x.sub_(top).exp_().sum(1, keepdim=True)
        value = top + total.log() - picked
        factor = None if weights is None else weights[part].unsqueeze(1)
        loss[part] = (value if factor is None else value * factor).squeeze(1)
        if not write_grad:
            continue
        one = torch.ones_like(total) if factor is None else factor
        x *= one / total
        x.scatter_(1, target, x.gather(1, target) - one)
        if x is not tile:
            tile.copy_(x)


class _WeightSum:
    """Sum over chunks of gradient.T @ hidden, in the weight's dtype where that costs no accuracy.

    Rounding a few partial sums to 16 bits loses no more than the 16-bit gradient does anyway; more are summed in fp32.
    fp16 is summed and kept in fp32: without the divisor the sum may overflow.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, wide: torch.dtype, chunks: int):
        self.shape, self.keep = weight.shape, wide if weight.dtype == torch.float16 else weight.dtype
        same = self.keep == dtype and (dtype == wide or chunks <= _MAX_ROUNDED_CHUNKS)
        self.dtype = dtype if same else wide
        self.sum: Tensor | None = None

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        g = gradient.t()
        if self.sum is None and self.dtype == g.dtype:
            self.sum = g @ hidden
        elif self.sum is None:
            self.sum = (g @ hidden).to(self.dtype)
        elif self.dtype == g.dtype:
            self.sum.addmm_(g, hidden)
        elif _adds_wide(g.device):
            torch.addmm(self.sum, g, hidden, out_dtype=self.dtype, out=self.sum)
        else:
            self.sum += g @ hidden

    def result(self, like: Tensor) -> Tensor:
        """[V, E]; a call without a supervised row adds nothing."""
        return like.new_zeros(self.shape, dtype=self.keep) if self.sum is None else self.sum.to(self.keep)


def _adds_wide(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to an fp32 one without rounding it (addmm's out_dtype)."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """gradient * factor, rounded once: a 0-dim factor would be rounded to the gradient's 16 bits first."""
    factor = factor.reshape((1,) * gradient.dim())
    out = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _products(
    gradients: Sequence[Tensor | None], factor: Tensor, dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """Gradients times the incoming one out of place, each in its dtype; one element but not 0-dim: see _scaled."""
    each = zip(gradients, dtypes, strict=True)
    return tuple(None if d is None else (d * factor.reshape((1,) * d.dim())).to(dtype) for d, dtype in each)


def _batched(tensor: Tensor) -> bool:
    """Whether it stands for a batch of tensors (vmap's): such a one has no storage of its own."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False


def _scatter(values: Tensor, rows: Tensor, shape: torch.Size, factor: Tensor | None) -> Tensor:
    """[K, E] -> [..., E] with zeros in the other rows; piecewise, so that no second copy of the values arises."""
    out = values.new_zeros(shape)
    if rows.numel():
        flat = out.view(-1, shape[-1])
        for part, index in zip(values.split(1024), rows.split(1024), strict=True):
            flat.index_copy_(0, index, part if factor is None else _scaled(part, factor, part.dtype))
    return out


class _Eager(torch.autograd.Function):
    """Keeps the gradient of the supervised rows only, and nothing of the head: ZeRO-3 may have freed it by backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, ignore_index, backend, *needs):
        out = _compute(hidden, weight, bias, labels, token_weights, ignore_index, backend, *needs)
        ctx.save_for_backward(out.rows, out.hidden, out.weight, out.bias, out.loss)
        ctx.shape = hidden.shape
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return out.loss, out.rows.shape[0]

    @staticmethod
    def backward(ctx, grad_out, _):
        rows, d_hidden, d_weight, d_bias, loss = ctx.saved_tensors
        # what nobody will read again is scaled in place: a [V, E] gradient exists once
        last = not graph_is_kept()
        _, weight_dtype, bias_dtype = ctx.dtypes
        with torch.no_grad():
            if _batched(grad_out):  # is_grads_batched: nothing in place, no out=
                if d_hidden is not None:
                    d_hidden = _scatter(d_hidden, rows, ctx.shape, None)
                return *_products((d_hidden, d_weight, d_bias), grad_out, ctx.dtypes), *(None,) * 7
            if d_hidden is not None:
                d_hidden = _scatter(d_hidden, rows, ctx.shape, grad_out)
            if d_weight is not None:
                d_weight = _scaled(d_weight, grad_out, weight_dtype, in_place=last and d_weight.dtype == weight_dtype)
            if d_bias is not None:
                d_bias = _scaled(d_bias, grad_out, bias_dtype)
        return *once(_NAME, (loss, grad_out), (d_hidden, d_weight, d_bias)), *(None,) * 7


# cudagraph_unsafe: finding the supervised rows is a synchronisation, which no CUDA graph can capture
@torch.library.custom_op(
    "psa_fast::supervised_linear_cross_entropy", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _compiled(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same behind a boundary torch.compile does not look into: summed loss, count, gradients (empty: not needed).

    A size that depends on the data would break the graph, so hidden's gradient leaves already scattered.
    """
    out = _compute(
        hidden, weight, bias, labels, token_weights, ignore_index, backend, need_hidden, need_weight, need_bias
    )
    count = torch.full_like(out.loss, out.rows.shape[0])
    none = hidden.new_empty(0)
    d_hidden = none if out.hidden is None else _scatter(out.hidden, out.rows, hidden.shape, None)
    d_weight = none.clone() if out.weight is None else out.weight
    return out.loss, count, d_hidden, d_weight, none.clone() if out.bias is None else out.bias


@_compiled.register_fake
def _(hidden, weight, bias, labels, token_weights, ignore_index, backend, need_hidden, need_weight, need_bias):
    wide = at_least_fp32(hidden.dtype)
    keep = wide if weight.dtype == torch.float16 else weight.dtype
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape, dtype=keep) if need_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[:1] if need_bias else 0, dtype=wide if need_bias else None),
    )


def _setup(ctx, inputs, output):
    loss, count, *gradients = output
    ctx.mark_non_differentiable(count, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, loss)
    ctx.needs = inputs[-3:]
    ctx.dtypes = tuple(None if t is None else t.dtype for t in inputs[:3])


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 10
    *gradients, loss = ctx.saved_tensors
    with torch.no_grad():
        needed = [d if need else None for d, need in zip(gradients, ctx.needs, strict=True)]
        scaled = _products(needed, grad_out, ctx.dtypes)
    return *once(_NAME, (loss, grad_out), scaled), *(None,) * 7


_compiled.register_autograd(_backward, setup_context=_setup)
