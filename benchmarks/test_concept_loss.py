"""concept_loss beside what it replaces, forward and backward.

CPU: fp32, plain torch. CUDA: bf16, the Triton kernels, and torch.compile of the plain forms. Launches are most of the
work there, so the times that include the host and those of a captured graph differ much.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ladder import CUDA, DEVICE, DTYPE, check, climb

from psa_fast.ops import concept_loss

E, SIZES = 4096, (7, 4)


def eager(pooled, weight, bias, targets, class_weights, label_smoothing):
    """What a user would write; NaN where a head has no label."""
    wide = torch.promote_types(pooled.dtype, torch.float32)
    scores = F.linear(pooled, weight, bias).to(wide).split(SIZES, 1)
    weights = class_weights.to(wide).split(SIZES)
    parts = zip(scores, targets.unbind(1), weights, strict=True)
    return sum(F.cross_entropy(*part, label_smoothing=label_smoothing) for part in parts)


def ours(pooled, weight, bias, targets, class_weights, label_smoothing, backend="auto"):
    return concept_loss(
        pooled, weight, bias, targets, class_weights=class_weights, label_smoothing=label_smoothing, backend=backend
    ).loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=lambda s: f"smoothing {s}")
@pytest.mark.parametrize("rows", [2, 16, 64])
def test_concept_loss(benchmark, capsys, rows, smoothing):
    torch.manual_seed(0)
    shapes = ((rows, E), (sum(SIZES), E), (sum(SIZES),))
    leaves = [torch.randn(*s, device=DEVICE, dtype=DTYPE).div(8).requires_grad_() for s in shapes]
    targets = torch.stack([torch.arange(rows, device=DEVICE) % n for n in SIZES], 1)
    rest = (targets, torch.rand(11, device=DEVICE) + 0.5, smoothing)
    functions = {"eager": eager, "ours": ours}
    if CUDA:
        functions |= {
            "eager, compiled": torch.compile(eager, fullgraph=True),
            "ours in torch": partial(ours, backend="torch"),
            "ours in torch, compiled": torch.compile(partial(ours, backend="torch"), fullgraph=True),
        }
    forms = {name: partial(function, *leaves, *rest) for name, function in functions.items()}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = eager(*exact, *rest)
    expected = (loss.detach(), *torch.autograd.grad(loss, exact))
    right, wrong = check(forms, leaves, expected, 2e-2 if CUDA else 1e-4)
    title = f"concept loss, {rows} rows, smoothing {smoothing}, {DEVICE}"
    climb(benchmark, capsys, title, right, leaves, 100, wrong=wrong)
