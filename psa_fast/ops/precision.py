"""The dtype of what must not be rounded."""

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, sums and losses over values of `dtype`."""
    return torch.promote_types(dtype, torch.float32)
