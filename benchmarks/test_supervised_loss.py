"""Forward and backward of the supervised language loss beside everything else it could be computed with.

CPU: fp32, the sweep at a reduced size. CUDA: 7B sizes in bf16.
"""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from baselines.lm_loss import baselines
from ladder import CUDA, DEVICE, check, climb

from psa_fast.ops import supervised_linear_cross_entropy


class Size(NamedTuple):
    rows: int
    width: int
    dtype: torch.dtype
    rounds: int
    vocabulary: int = 32064


SWEEP = Size(8192, 4096, torch.bfloat16, 20) if CUDA else Size(1024, 512, torch.float32, 3)
TARGET = SWEEP if CUDA else Size(4096, 1024, torch.float32, 3)
CASES = [(SWEEP, share, head) for head in ("frozen", "trained") for share in (0.05, 0.25, 0.5, 1.0)]
CASES.append((TARGET, 0.1, "frozen"))
TOLERANCE = 1e-2 if CUDA else 1e-5


def inputs(size, share, head):
    torch.manual_seed(0)
    hidden = torch.randn(size.rows, size.width, device=DEVICE).to(size.dtype).requires_grad_()
    weight = (torch.randn(size.vocabulary, size.width, device=DEVICE) / size.width**0.5).to(size.dtype)
    labels = torch.randint(size.vocabulary, (size.rows,), device=DEVICE)
    labels[torch.randperm(size.rows, device=DEVICE)[round(share * size.rows) :]] = -100
    return hidden, weight.requires_grad_(head == "trained"), labels


def truth(hidden, weight, labels):
    """Loss and gradients in fp64; rows without a label have none."""
    kept = labels != -100
    h, w = hidden.detach()[kept].double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ w.t(), labels[kept])
    loss.backward()
    d_hidden = torch.zeros_like(hidden, dtype=torch.float64)
    d_hidden[kept] = h.grad
    return (loss.detach(), d_hidden, *([w.grad] if weight.requires_grad else []))


@pytest.mark.parametrize(("size", "share", "head"), CASES, ids=[f"{s.rows}x{s.width}-{p:.0%}-{h}" for s, p, h in CASES])
def test_supervised_loss(benchmark, capsys, size, share, head):
    data = inputs(size, share, head)
    leaves = [t for t in data[:2] if t.requires_grad]
    losses = baselines(DEVICE) | {"ours": supervised_linear_cross_entropy}
    forms = {name: partial(loss, *data) for name, loss in losses.items()}
    right, wrong = check(forms, leaves, truth(*data), TOLERANCE)
    title = f"supervised loss, {size.rows} rows, {share:.0%} supervised, E={size.width}, {head} head, {DEVICE}"
    climb(benchmark, capsys, title, right, leaves, size.rounds, wrong=wrong)
