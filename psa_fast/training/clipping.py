"""Gradient clipping of each part by itself, so that parts trained together move as they would apart.

DeepSpeed knows one norm over everything it trains. Between its backward and its step the reduced gradients can be read
and written through its public accessors, under every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from psa_fast.compat.deepspeed import is_partitioned


def clip_each(groups: Sequence[Sequence[torch.nn.Parameter]], max_norm: float) -> torch.Tensor:
    """Scale the gradients of each group to a norm of at most `max_norm`. A collective, without synchronising the host.

    Call it after the last backward of an optimizer step, with DeepSpeed's own clipping off. Under ZeRO-3 each rank
    touches its shards only; under ZeRO-0 to 2 every gradient is gathered first.

    Args:
        groups: parameters that a DeepSpeed engine trains; every rank gives the same ones.
        max_norm: positive.

    Returns:
        fp32 [groups]: the norms before clipping.
    """
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

    sharded = is_partitioned(groups[0][0])
    read, write = (safe_get_local_grad, safe_set_local_grad) if sharded else (safe_get_full_grad, safe_set_full_grad)
    gradients = [[read(p) for p in group] for group in groups]
    squares = torch.stack([torch.stack([g.float().square().sum() for g in group]).sum() for group in gradients])
    if sharded:
        dist.all_reduce(squares)
    norms = squares.sqrt()
    # DeepSpeed's own formula
    factors = max_norm / (norms + 1e-6).clamp_min(max_norm)
    for group, grads, factor in zip(groups, gradients, factors, strict=True):
        for parameter, gradient in zip(group, grads, strict=True):
            write(parameter, gradient * factor)
    return norms
