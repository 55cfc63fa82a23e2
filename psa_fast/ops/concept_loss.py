"""The loss of the concept heads: every head is a slice of one linear map, every head has its own cross-entropy.

L = sum over heads of CE(head) (arXiv 2411.11543, section 3: risk type, 7 classes, and risk level, 4 classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> ConceptLoss:
    """Logits and cross-entropies of all heads; each head as F.cross_entropy of its slice, but never NaN.

    Args:
        pooled: [B, E]; B may be 0.
        weight: [sum(head_sizes), E], the heads' rows one after the other.
        bias: [sum(head_sizes)] or None.
        targets: int64 [B, heads]; `ignore_index` marks a row that has no label for that head.
        head_sizes: number of classes of each head.
        class_weights: [sum(head_sizes)], or one tensor (or None) per head.
        label_smoothing: as in F.cross_entropy.
        ignore_index: the target that is left out.
        num_items: divide each head's sum by this (a number, a 0-dim tensor, or one value per head [heads]) instead of
            by the sum of the class weights of its valid targets (their count without weights), as for a batch that is
            spread over ranks or accumulation steps.

    Returns:
        ConceptLoss. A head without any valid target has loss 0, connected to the graph. Logits are computed in the
        dtype of `pooled`, softmax and loss in fp32 at least, whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together.
    """
    classes = sum(head_sizes)
    if pooled.dim() != 2 or weight.shape != (classes, pooled.shape[1]):
        raise ValueError(f"pooled {tuple(pooled.shape)}, weight {tuple(weight.shape)}: not [B, E] and [{classes}, E]")
    if targets.shape != (pooled.shape[0], len(head_sizes)):
        raise ValueError(f"targets must be [{pooled.shape[0]}, {len(head_sizes)}], got {tuple(targets.shape)}")
    weights = _per_head(class_weights, head_sizes)
    with torch.autocast(pooled.device.type, enabled=False):
        logits = F.linear(pooled, weight.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = []
        for head, (scores, w) in enumerate(zip(wide.split(tuple(head_sizes), dim=1), weights, strict=True)):
            target = targets[:, head]
            w = None if w is None else w.to(device=scores.device, dtype=scores.dtype)
            total = F.cross_entropy(
                scores, target, w, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
            )
            if num_items is None:
                valid = target != ignore_index
                share = valid.to(scores.dtype) if w is None else w[target.where(valid, 0)] * valid
                norm = share.sum()
                total = total / norm.where(norm > 0, 1)
            losses.append(total)
        stacked = torch.stack(losses)
        if num_items is not None:
            norm = torch.as_tensor(num_items, device=stacked.device, dtype=stacked.dtype)
            if norm.dim() > 1 or (norm.dim() == 1 and norm.shape[0] != len(head_sizes)):
                raise ValueError(f"num_items must be one number or {len(head_sizes)} numbers, got {tuple(norm.shape)}")
            stacked = stacked / norm.where(norm > 0, 1)  # 0 items: the sum is 0 too
        return ConceptLoss(stacked.sum(), stacked, logits)


def _per_head(
    class_weights: Tensor | Sequence[Tensor | None] | None, head_sizes: Sequence[int]
) -> Sequence[Tensor | None]:
    if class_weights is None:
        return [None] * len(head_sizes)
    if isinstance(class_weights, Tensor):
        if class_weights.shape != (sum(head_sizes),):
            raise ValueError(f"class_weights must have {sum(head_sizes)} entries, got {tuple(class_weights.shape)}")
        return class_weights.split(tuple(head_sizes))
    if len(class_weights) != len(head_sizes):
        raise ValueError(f"class_weights needs one entry per head ({len(head_sizes)}), got {len(class_weights)}")
    for w, size in zip(class_weights, head_sizes, strict=True):
        if w is not None and w.shape != (size,):
            raise ValueError(f"class_weights of a head with {size} classes has shape {tuple(w.shape)}")
    return class_weights
