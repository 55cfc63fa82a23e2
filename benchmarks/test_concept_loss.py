"""concept_loss beside what it replaces, forward and backward. Each form is checked before it is timed.

CPU: fp32, plain torch. CUDA: bf16, the Triton kernels, and torch.compile of the plain forms. Times include the host,
because launches are most of the work.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from psa_fast.ops import concept_loss

E, SIZES = 4096, (7, 4)
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def eager(pooled, weight, bias, targets, **options):
    """What a user would write; NaN where a head has no label."""
    kinds, levels = F.linear(pooled, weight, bias).float().split(SIZES, 1)
    w_kinds, w_levels = options.pop("class_weights", torch.ones(11, device=pooled.device)).split(SIZES)
    return F.cross_entropy(kinds, targets[:, 0], w_kinds, **options) + F.cross_entropy(
        levels, targets[:, 1], w_levels, **options
    )


def plain(*tensors, **options):
    return concept_loss(*tensors, **options, backend="torch").loss


def ours(*tensors, **options):
    return concept_loss(*tensors, **options).loss


compiled_eager = functools.wraps(eager)(torch.compile(eager, fullgraph=True))
compiled_plain = functools.wraps(plain)(torch.compile(plain, fullgraph=True))
FORMS = {"eager": eager, "ours": ours}
if CUDA:
    FORMS |= {"eager, compiled": compiled_eager, "ours in torch": plain, "ours in torch, compiled": compiled_plain}


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=lambda s: f"smoothing {s}")
@pytest.mark.parametrize("rows", [2, 16, 64])
@pytest.mark.parametrize("form", FORMS)
def test_concept_loss(benchmark, form, rows, smoothing):
    benchmark.group = f"concept loss, {rows} rows, smoothing {smoothing}, {DEVICE} {DTYPE}"
    torch.manual_seed(0)
    shapes = ((rows, E), (sum(SIZES), E), (sum(SIZES),))
    tensors = [torch.randn(*s, device=DEVICE, dtype=DTYPE).div(8).requires_grad_() for s in shapes]
    targets = torch.stack([torch.randint(n, (rows,), device=DEVICE) for n in SIZES], 1)
    options = {"label_smoothing": smoothing, "class_weights": torch.rand(11, device=DEVICE) + 0.5}

    def step(function=FORMS[form]):
        loss = function(*tensors, targets, **options)
        gradients = torch.autograd.grad(loss, tensors)
        if CUDA:
            torch.cuda.synchronize()
        return loss.detach(), *gradients

    tolerance = 2e-2 if CUDA else 1e-4
    torch.testing.assert_close(step(), step(eager), rtol=tolerance, atol=tolerance)
    benchmark.pedantic(step, rounds=100, warmup_rounds=10)
