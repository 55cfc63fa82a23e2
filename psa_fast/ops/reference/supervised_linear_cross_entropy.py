"""The specification of supervised_linear_cross_entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Return the mean cross-entropy [] of a linear head over the rows that have a label; all their logits exist.

    This is the specification of `psa_fast.ops.supervised_linear_cross_entropy`, which tests, benchmarks and docs go by.
    `hidden` h is [..., E], `weight` W is [V, E] and `bias` b is [V]; the labels are int64 [...], already aligned with
    `hidden`, and `ignore_index` where a row has none. `token_weights` w [...] are factors on the rows' losses and 1
    where none are given. With S the rows that have a label, x_i = W h_i + b, and n the number of rows in S, or
    `num_items`, a number or a tensor [],

        L = 1/n  sum_{i in S} w_i (logsumexp(x_i) - x_i[label_i])

    where n = 0 counts as 1. Token weights and n are constants.
    """
    supervised = labels != ignore_index
    x = F.linear(hidden[supervised], weight, bias)  # [K, V]
    picked = x.gather(1, labels[supervised].unsqueeze(1)).squeeze(1)
    losses = x.logsumexp(1) - picked
    if token_weights is not None:
        losses = losses * token_weights.detach()[supervised]
    n = supervised.sum() if num_items is None else torch.as_tensor(num_items)
    return losses.sum() / n.where(n > 0, 1).to(losses)
