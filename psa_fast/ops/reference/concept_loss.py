"""The specification of concept_loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of all heads' cross-entropies [], each head's [heads], and the logits [B, sum(head_sizes)].

    This is the specification of `psa_fast.ops.concept_loss`, which tests, benchmarks and docs go by. `pooled` x is
    [B, E]; `weight` [sum(head_sizes), E] and `bias` [sum(head_sizes)] hold the heads' rows one after the other; the
    targets are int64 [B, heads], `ignore_index` where a row has no label y for a head. `class_weights` w are
    [sum(head_sizes)], or one tensor or None for each head; they are 1 where none are given. `num_items` is one number,
    or a tensor [] or [heads]. For head h with n classes, the rows i that have a label, and eps = `label_smoothing`,

        p_i = softmax(x_i W_h^T + b_h)      q_ic = (1 - eps) w_y [c = y] + (eps / n) w_c
        losses_h = sum_i -sum_c q_ic log p_ic  /  N      N = sum_i w_y, or num_items; where it is 0 it counts as 1

    which is F.cross_entropy of the head's slice, but 0 where that is NaN. Class weights and N are constants.
    """
    sizes = list(head_sizes)
    logits = F.linear(pooled, weight, bias)
    if class_weights is None:
        class_weights = [None] * len(sizes)
    elif isinstance(class_weights, Tensor):
        class_weights = class_weights.split(sizes)

    losses = []
    for h, (scores, w) in enumerate(zip(logits.split(sizes, 1), class_weights, strict=True)):
        labelled = targets[:, h] != ignore_index
        log_p, y = scores[labelled].log_softmax(1), targets[labelled, h]
        w = scores.new_ones(sizes[h]) if w is None else w.detach().to(scores)
        one_hot = y.unsqueeze(1) == torch.arange(sizes[h], device=y.device)
        q = (1 - label_smoothing) * w[y].unsqueeze(1) * one_hot + label_smoothing / sizes[h] * w
        norm = w[y].sum() if num_items is None else torch.as_tensor(num_items).to(scores).expand(len(sizes))[h]
        losses.append(-(q * log_p).sum() / norm.where(norm > 0, 1))
    return torch.stack(losses).sum(), torch.stack(losses), logits
