"""Cross-entropy of a linear LM head on the supervised rows only, without ever holding all logits.

In a VLM batch 70 to 95 percent of the rows (image, prompt, padding) carry no label. Those never meet the head, the rest
does in chunks, and each chunk's gradient is formed while its logits are at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 24  # logits per chunk: 64 MB in fp32, 524 rows of a 32k vocabulary


def supervised_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
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

    Returns:
        Scalar in fp32 at least. No supervised row: 0, connected to the graph. Products are computed in the dtype of
        `hidden` (weight and bias are cast to it), logsumexp and loss in fp32 at least, whatever autocast says. The
        gradient of `weight` and `bias` is computed only where they require it.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [..., E] and [V, E]")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} must have hidden's shape {tuple(hidden.shape)} without E")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights {tuple(token_weights.shape)} and labels {tuple(labels.shape)} must agree")
    train = torch.is_grad_enabled()
    needs = tuple(train and t is not None and t.requires_grad for t in (hidden, weight, bias))
    return _SupervisedLinearCrossEntropy.apply(
        hidden, weight, bias, labels.reshape(-1), token_weights, num_items, ignore_index, needs
    )


class _SupervisedLinearCrossEntropy(torch.autograd.Function):
    """Backward only scales: nothing of the head is read there, so ZeRO-3 may have freed it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, num_items, ignore_index, needs):
        with torch.autocast(hidden.device.type, enabled=False):
            dtype, wide = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
            need_hidden, need_weight, need_bias = needs
            rows = (labels != ignore_index).nonzero().squeeze(1)  # the only device synchronisation
            count = rows.shape[0]
            h = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
            y = labels.index_select(0, rows)
            norm = torch.as_tensor(max(count, 1) if num_items is None else num_items, device=hidden.device, dtype=wide)
            norm = norm.where(norm > 0, 1)  # 0 items anywhere: the sum is 0 too
            scale = None
            if token_weights is not None:
                scale = token_weights.detach().reshape(-1).index_select(0, rows).to(wide).unsqueeze(1)

            w = weight.to(dtype)
            b = None if bias is None else bias.to(wide)
            loss = hidden.new_zeros((), dtype=wide)
            d_h: Tensor | None = torch.empty_like(h) if need_hidden else None
            d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
            d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
            step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[0]))
            for start in range(0, count, step):
                part = slice(start, start + step)
                logits = (h[part] @ w.t()).to(wide)
                if b is not None:
                    logits = logits + b
                lse = torch.logsumexp(logits, dim=1, keepdim=True)
                target = y[part].unsqueeze(1)
                row_loss = lse - logits.gather(1, target)
                loss += (row_loss if scale is None else row_loss * scale[part]).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue
                grad = logits.sub_(lse).exp_()  # softmax, in place of the logits
                grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
                if scale is not None:
                    grad.mul_(scale[part])
                low = grad.to(dtype)
                if d_h is not None:
                    d_h[part] = low @ w
                if need_weight:
                    d_weight += low.t() @ h[part]
                if need_bias:
                    d_bias += grad.sum(0)
            # the divisor is applied in backward: in fp16 a gradient divided by a large count would underflow here
            ctx.save_for_backward(rows, norm, d_h, d_weight, d_bias)
            ctx.hidden_shape = hidden.shape
            ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
            return loss / norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        rows, norm, d_h, d_weight, d_bias = ctx.saved_tensors
        factor = grad_out / norm
        hidden_grad = weight_grad = bias_grad = None
        if d_h is not None:
            flat = d_h.new_zeros(ctx.hidden_shape).view(-1, ctx.hidden_shape[-1])
            hidden_grad = flat.index_copy_(0, rows, (d_h * factor).to(d_h.dtype)).view(ctx.hidden_shape)
        if d_weight is not None:
            weight_grad = (d_weight * factor).to(ctx.dtypes[0])
        if d_bias is not None:
            bias_grad = (d_bias * factor).to(ctx.dtypes[1])
        return hidden_grad, weight_grad, bias_grad, None, None, None, None, None
