"""The loss of the concept heads: every head is a slice of one linear map, every head has its own cross-entropy.

L = sum over heads of CE(head) (arXiv 2411.11543, section 3: risk type, 7 classes, and risk level, 4 classes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psa_fast.ops.backend import Backend, resolve, within
from psa_fast.ops.limits import no_forward_mode, same_device
from psa_fast.ops.precision import at_least_fp32

_SUM = 2  # nll_loss's number for reduction="sum"


class ConceptLoss(NamedTuple):
    """loss: scalar, the sum of `losses`; losses: [heads]; logits: [B, sum(head_sizes)] in the dtype of `pooled`."""

    loss: Tensor
    losses: Tensor
    logits: Tensor


def concept_loss(
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head_sizes: Sequence[int] = (7, 4),
    class_weights: Tensor | Sequence[Tensor | None] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    backend: Backend = "auto",
) -> ConceptLoss:
    """Logits and cross-entropies of all heads; each head as F.cross_entropy of its slice, but never NaN.

    Args:
        pooled: [B, E]; B may be 0.
        weight: [sum(head_sizes), E], the heads' rows one after the other.
        bias: [sum(head_sizes)] or None.
        targets: int64 [B, heads]; `ignore_index` marks a row that has no label for that head.
        head_sizes: number of classes of each head.
        class_weights: [sum(head_sizes)], or one tensor (or None) per head. Not differentiated.
        label_smoothing: as in F.cross_entropy.
        ignore_index: the target that is left out.
        num_items: divide each head's sum by this (a number, a 0-dim tensor, or one value per head [heads]) instead of
            by the sum of the class weights of its valid targets (their count without weights), as for a batch that is
            spread over ranks or accumulation steps. Not differentiated.
        backend: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton". The kernels take up to 64 classes in
            up to 16 heads in float16, bfloat16 and float32; "auto" leaves the rest to torch.

    Returns:
        ConceptLoss. A head without any valid target has loss 0, connected to the graph. Logits are computed in the
        dtype of `pooled`, softmax and loss in fp32 at least, whatever autocast says. Both backends can be
        differentiated twice; torch.compile cannot do that to any function.

    Raises:
        ValueError: shapes that do not fit together, two devices, or backend="triton" where the kernels cannot run.
        NotImplementedError: under forward-mode differentiation with the kernels.
        IndexError: a target outside its head, on the CPU. The Triton kernels make the loss NaN instead.
    """
    classes, heads = sum(head_sizes), len(head_sizes)
    if pooled.dim() != 2 or weight.shape != (classes, pooled.shape[1]):
        raise ValueError(f"pooled {tuple(pooled.shape)}, weight {tuple(weight.shape)}: not [B, E] and [{classes}, E]")
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias must be [{classes}], got {tuple(bias.shape)}")
    if targets.shape != (pooled.shape[0], heads) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 [{pooled.shape[0]}, {heads}], got {targets.dtype} {tuple(targets.shape)}"
        )
    same_device("concept_loss", pooled=pooled, weight=weight, bias=bias, targets=targets)
    if isinstance(num_items, Tensor):
        if num_items.dim() > 1 or (num_items.dim() == 1 and num_items.shape[0] != heads):
            raise ValueError(f"num_items must be one number or {heads} numbers, got {tuple(num_items.shape)}")
        num_items = _beside(pooled, "num_items", num_items)
    wide = at_least_fp32(pooled.dtype)
    weights = _all_heads(class_weights, tuple(head_sizes), pooled, wide)
    sizes = tuple(head_sizes)
    if _chosen(backend, pooled, weight, sizes) == "torch":
        return _torch_concept_loss(
            pooled, weight, bias, targets, weights, num_items, sizes, label_smoothing, ignore_index
        )
    no_forward_mode('concept_loss with backend="triton"', pooled, weight, bias)
    need_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (pooled, weight, bias))
    divisors, divisor = (num_items, None) if isinstance(num_items, Tensor) else (None, num_items)
    out = torch.ops.psa_fast.concept_loss(
        pooled, weight, bias, targets, weights, divisors, divisor, sizes, label_smoothing, ignore_index, need_grad
    )
    return ConceptLoss(out[0], out[1], out[3])


def _all_heads(
    class_weights: Tensor | Sequence[Tensor | None] | None,
    head_sizes: tuple[int, ...],
    pooled: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """Class weights of all heads as one tensor [sum(head_sizes)], or None where no head has any."""
    if class_weights is None:
        return None
    if isinstance(class_weights, Tensor):
        if class_weights.shape != (sum(head_sizes),):
            raise ValueError(f"class_weights must have {sum(head_sizes)} entries, got {tuple(class_weights.shape)}")
        return _beside(pooled, "class_weights", class_weights).to(dtype)
    if len(class_weights) != len(head_sizes):
        raise ValueError(f"class_weights needs one entry per head ({len(head_sizes)}), got {len(class_weights)}")
    for w, size in zip(class_weights, head_sizes, strict=True):
        if w is not None and w.shape != (size,):
            raise ValueError(f"class_weights of a head with {size} classes has shape {tuple(w.shape)}")
    if all(w is None for w in class_weights):
        return None
    parts = [
        pooled.new_ones(size, dtype=dtype) if w is None else _beside(pooled, "class_weights", w).to(dtype)
        for w, size in zip(class_weights, head_sizes, strict=True)
    ]
    return torch.cat(parts)


def _beside(pooled: Tensor, name: str, tensor: Tensor) -> Tensor:
    """A constant on the device of `pooled`; one on meta has nothing that could be brought there."""
    if tensor.is_meta:
        same_device("concept_loss", pooled=pooled, **{name: tensor})
    return tensor.detach().to(pooled.device)


def _chosen(backend: Backend, pooled: Tensor, weight: Tensor, head_sizes: Sequence[int]) -> str:
    choice = resolve(backend, pooled)
    if choice == "torch":
        return choice
    from psa_kernels.concept_loss import MAX_CLASSES, MAX_HEADS

    limit = None
    if sum(head_sizes) > MAX_CLASSES or len(head_sizes) > MAX_HEADS:
        limit = f"concept_loss has more than {MAX_CLASSES} classes or {MAX_HEADS} heads"
    elif pooled.device.type == "cuda" and torch.float64 in (pooled.dtype, weight.dtype):
        limit = "the kernels of concept_loss have no fp64 products"
    return within(choice, backend, limit)


def _torch_concept_loss(
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    num_items: float | Tensor | None,
    head_sizes: tuple[int, ...],
    label_smoothing: float,
    ignore_index: int,
) -> ConceptLoss:
    """What runs on a CPU, and is differentiated where the kernels' gradients are differentiated again."""
    with _without_autocast(pooled.device.type):
        logits = F.linear(pooled, weight.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype))
        scores = logits.to(at_least_fp32(logits.dtype))
        weights = [None] * len(head_sizes) if class_weights is None else class_weights.split(head_sizes)
        sums, shares = [], []
        for s, target, w in zip(scores.split(head_sizes, 1), targets.unbind(1), weights, strict=True):
            logp = torch.log_softmax(s, 1)
            # unlike F.nll_loss it also returns the sum of the valid targets' weights
            total, share = torch.ops.aten.nll_loss_forward.default(logp, target, w, _SUM, ignore_index)
            if label_smoothing:
                each = logp.where((target != ignore_index).unsqueeze(1), 0).sum(0)
                uniform = each.sum() if w is None else each.dot(w)
                total = (1 - label_smoothing) * total - label_smoothing / s.shape[1] * uniform
            sums.append(total)
            shares.append(share)
        if num_items is None:
            norms = torch.stack(shares)
        else:
            norms = torch.as_tensor(num_items, dtype=scores.dtype, device=scores.device)
        losses = torch.stack(sums) / norms.where(norms > 0, 1)  # 0 items: the sum is 0 too
        return ConceptLoss(losses.sum(), losses, logits)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    # entering torch.autocast costs as much as three of these small operations, and the meta device has none
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    on = available and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


torch.library.define(
    "psa_fast::concept_loss",
    "(Tensor pooled, Tensor weight, Tensor? bias, Tensor targets, Tensor? class_weights, Tensor? num_items, "
    "float? items, int[] head_sizes, float label_smoothing, int ignore_index, bool need_grad) "
    "-> (Tensor loss, Tensor losses, Tensor norms, Tensor logits, Tensor dlogits)",
)
torch.library.define(
    "psa_fast::concept_loss_backward",
    "(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_logits, Tensor dlogits, Tensor norms, Tensor pooled, "
    "Tensor weight, int[] head_sizes, ScalarType bias_dtype, bool[] needs) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("psa_fast::concept_loss", ("CPU", "CUDA"))
def _forward(*args):
    """One launch each way; the gradient of the logits is formed in forward, backward scales it and multiplies."""
    from psa_kernels.concept_loss import concept_loss_forward

    return concept_loss_forward(*args)


@torch.library.impl("psa_fast::concept_loss_backward", ("CPU", "CUDA"))
def _backward(*args):
    from psa_kernels.concept_loss import concept_loss_backward

    return concept_loss_backward(*args)


@torch.library.register_fake("psa_fast::concept_loss")
def _forward_fake(pooled, weight, bias, targets, class_weights, num_items, items, head_sizes, *options):
    (b, _), c, heads, need_grad = pooled.shape, weight.shape[0], len(head_sizes), options[-1]
    wide = at_least_fp32(pooled.dtype)
    loss, losses, norms = (pooled.new_empty(shape, dtype=wide) for shape in ((), heads, heads))
    return loss, losses, norms, pooled.new_empty(b, c), pooled.new_empty(b if need_grad else 0, c, dtype=wide)


@torch.library.register_fake("psa_fast::concept_loss_backward")
def _backward_fake(grad_loss, grad_losses, grad_logits, dlogits, norms, pooled, weight, head_sizes, bias_dtype, needs):
    (b, e), c = pooled.shape, weight.shape[0]
    dbias = weight.new_empty(c if needs[2] else 0, dtype=bias_dtype)
    return pooled.new_empty(b if needs[0] else 0, e), weight.new_empty(c if needs[1] else 0, e), dbias


def _setup_context(ctx, inputs, output):
    pooled, weight, bias, targets, class_weights, divisors, *options, _ = inputs
    _, _, norms, _, dlogits = output
    ctx.mark_non_differentiable(norms, dlogits)
    ctx.set_materialize_grads(False)
    # the Parameters themselves are saved: under ZeRO-3 their owner's pre-backward hook brings the data back
    ctx.save_for_backward(pooled, weight, bias, targets, class_weights, divisors, norms, dlogits)
    ctx.options = options


def _gradients(ctx, grad_loss, grad_losses, _, grad_logits, __):
    pooled, weight, bias, targets, class_weights, divisors, norms, dlogits = ctx.saved_tensors
    divisor, head_sizes, *rest = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    incoming = grad_loss, grad_losses, grad_logits
    if all(grad is None for grad in incoming):
        return (None,) * 11
    if torch.is_grad_enabled():  # create_graph: the gradients of the torch form, which can be differentiated again
        num_items = divisor if divisors is None else divisors
        outputs = _torch_concept_loss(pooled, weight, bias, targets, class_weights, num_items, tuple(head_sizes), *rest)
        used = [(out, grad) for out, grad in zip(outputs, incoming, strict=True) if grad is not None]
        wanted = [t for t, need in zip((pooled, weight, bias), needs, strict=True) if need]
        grads = iter(torch.autograd.grad([u[0] for u in used], wanted, [u[1] for u in used], create_graph=True))
        return *(next(grads) if need else None for need in needs), *(None,) * 8
    bias_dtype = (weight if bias is None else bias).dtype
    grads = torch.ops.psa_fast.concept_loss_backward(
        *incoming, dlogits, norms, pooled, weight, head_sizes, bias_dtype, needs
    )
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 8


torch.library.register_autograd("psa_fast::concept_loss", _gradients, setup_context=_setup_context)
