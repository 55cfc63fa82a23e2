"""What a language-model loss is computed with elsewhere: (hidden [N, E], weight [V, E], labels [N]) -> mean loss.

Ignored labels are -100. The plain forms of Liger's and TRL's algorithms run on any device; the packages themselves are
offered where they are installed and a CUDA device is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_logits(hidden, weight, labels):
    """Every row meets the head; what a Hugging Face model does with labels."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def torch_fused(hidden, weight, labels):
    """torch >= 2.13, as called without options."""
    return F.linear_cross_entropy(hidden, weight, labels)


def torch_fused_chunked(hidden, weight, labels):
    """torch >= 2.13, with its own choice of chunks."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger_form(hidden, weight, labels):
    """Liger's fused linear cross-entropy in plain torch: chunks over all rows, the gradient in forward."""
    return _LigerForm.apply(hidden, weight, labels)


class _LigerForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        (rows, width), vocabulary = hidden.shape, weight.shape[0]
        # a chunk's logits take about as much as the hidden states
        target_rows = -(-rows // -(-vocabulary // width))
        step = 1 << (target_rows - 1).bit_length()
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_weight = torch.zeros_like(weight) if weight.requires_grad else None
        supervised = labels != -100
        count = supervised.sum()
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            kept = supervised[part].unsqueeze(1)
            target = labels[part].clamp(min=0).unsqueeze(1)
            logits = (hidden[part] @ weight.t()).float()
            lse = logits.logsumexp(1, keepdim=True)
            total += ((lse - logits.gather(1, target)) * kept).sum()
            gradient = logits.sub_(lse).exp_()
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
            gradient = gradient.mul_(kept / count).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), hidden[part])
        ctx.save_for_backward(d_hidden, d_weight)
        return total / count

    @staticmethod
    def backward(ctx, grad_out):
        d_hidden, d_weight = ctx.saved_tensors
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                gradient.mul_(grad_out)
        return d_hidden, d_weight, None


def trl_form(hidden, weight, labels, chunk_size=256):
    """TRL's chunked loss: supervised rows in chunks of 256 under gradient checkpointing.

    Products stay in the dtype of `hidden`; TRL widens both operands to fp32, which is slower.
    """
    supervised = labels != -100
    hidden, labels = hidden[supervised], labels[supervised]

    def chunk_loss(h, y):
        return F.cross_entropy((h @ weight.t()).float(), y, reduction="sum")

    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks) / len(labels)


def _liger_package(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def _cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def baselines(device: str) -> dict[str, Loss]:
    """Name -> loss, of those that run here."""
    found: dict[str, Loss] = {"full_logits": full_logits, "liger_form": liger_form, "trl_form": trl_form}
    if hasattr(F, "linear_cross_entropy"):
        found |= {"torch": torch_fused, "torch_chunked": torch_fused_chunked}
    if device == "cuda":
        found["full_logits_compiled"] = torch.compile(full_logits, dynamic=False)
        packages = {"liger_kernel": _liger_package, "cut_cross_entropy": _cut_cross_entropy}
        found |= {name: loss for name, loss in packages.items() if find_spec(name)}
    return found
