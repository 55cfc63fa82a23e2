"""Small values from the host to the device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of python numbers. `torch.tensor(..., device=...)` would wait for all that is queued on a GPU."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
