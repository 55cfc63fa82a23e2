"""The optimisation that both parts of the base's training share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Steps:
    """An optimisation: iterates over step numbers under a progress bar; `step(loss)` updates the parameters.

    AdamW with betas .9/.98, gradients clipped to norm 1, linear warm-up, cosine decay to zero.
    """

    def __init__(self, name: str, parameters: list[Tensor], lr: float, steps: int, warmup: int, progress: bool):
        from tqdm import tqdm

        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        warmup = min(warmup, max(1, steps // 4))

        def factor(step: int) -> float:
            return min((step + 1) / warmup, 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps))))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.smoothed = math.nan
        self.bar = tqdm(range(steps), desc=name, unit="step", disable=not progress)

    def __iter__(self) -> Iterator[int]:
        return iter(self.bar)

    def step(self, loss: Tensor) -> None:
        """Backward, clip, update, next learning rate."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        value = loss.item()
        self.smoothed = value if math.isnan(self.smoothed) else 0.9 * self.smoothed + 0.1 * value
        self.bar.set_postfix(loss=f"{self.smoothed:.3f}", refresh=False)
