"""supervised_linear_cross_entropy against F.cross_entropy in fp64, and its edge cases."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import psa_fast.ops.supervised_cross_entropy as module
from psa_fast.ops import supervised_linear_cross_entropy


def lm_inputs(shape=(3, 6), e=5, v=13):
    torch.manual_seed(2)
    hidden = torch.randn(*shape, e, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, e, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(v, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, v, shape)
    labels[torch.rand(shape) < 0.5] = -100
    labels.view(-1)[0] = 4
    return hidden, weight, bias, labels


def oracle(hidden, weight, bias, labels, token_weights=None, num_items=None):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    rows = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    if token_weights is not None:
        rows = rows * token_weights.flatten()
    return rows.sum() / ((labels != -100).sum() if num_items is None else num_items)


@pytest.mark.parametrize("chunk", [13, 40, 1 << 20])
@pytest.mark.parametrize("num_items", [None, 7.5, torch.tensor(21)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_supervised_cross_entropy_equals_full_logits(monkeypatch, with_bias, weighted, num_items, chunk):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, labels = lm_inputs()
    bias = bias if with_bias else None
    token_weights = torch.rand(labels.shape, dtype=torch.float64) if weighted else None
    got = supervised_linear_cross_entropy(
        hidden, weight, labels, bias=bias, token_weights=token_weights, num_items=num_items
    )
    expected = oracle(hidden, weight, bias, labels, token_weights, num_items)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    for g, r in zip(torch.autograd.grad(3 * got, wanted), torch.autograd.grad(3 * expected, wanted), strict=True):
        torch.testing.assert_close(g, r, rtol=1e-11, atol=1e-11)


def test_supervised_cross_entropy_gradcheck_under_autocast():
    hidden, weight, bias, labels = lm_inputs((4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.autograd.gradcheck(
            lambda h, w, b: supervised_linear_cross_entropy(h, w, labels, bias=b), (hidden, weight, bias)
        )


@pytest.mark.parametrize("num_items", [None, torch.tensor(0.0), 5])
@pytest.mark.parametrize("shape", [(0, 6), (2, 3)])
def test_nothing_supervised_is_a_connected_zero(shape, num_items):
    hidden, weight, bias, _ = lm_inputs((2, 3))
    hidden = hidden.detach()[: shape[0]].requires_grad_()
    labels = torch.full((shape[0], hidden.shape[1]), -100)
    loss = supervised_linear_cross_entropy(hidden, weight, labels, bias=bias, num_items=num_items)
    assert loss.item() == 0
    for g in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert (g == 0).all()


def test_views_frozen_head_and_no_grad():
    hidden, weight, bias, labels = lm_inputs((3, 7))
    weight, bias = weight.detach(), bias.detach()
    got = supervised_linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:], bias=bias)
    expected = oracle(hidden[:, :-1], weight, bias, labels[:, 1:])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, hidden)[0], torch.autograd.grad(expected, hidden)[0], rtol=1e-11, atol=1e-11
    )
    with torch.no_grad():
        assert not supervised_linear_cross_entropy(hidden, weight, labels).requires_grad
    # a transposed weight and an expanded hidden state
    wide = hidden[:1, :1].detach().expand(3, 7, -1).requires_grad_()
    loss = supervised_linear_cross_entropy(wide, weight.t().contiguous().t(), labels)
    torch.testing.assert_close(loss, oracle(wide, weight, None, labels), rtol=1e-12, atol=1e-12)


def test_only_supervised_rows_meet_the_head():
    """NaN in an unsupervised row reaches neither the loss nor a gradient."""
    hidden, weight, _, labels = lm_inputs()
    poisoned = hidden.detach().masked_fill((labels == -100)[..., None], float("nan")).requires_grad_()
    loss = supervised_linear_cross_entropy(poisoned, weight, labels)
    torch.testing.assert_close(loss, oracle(hidden, weight, None, labels), rtol=1e-12, atol=1e-12)
    for g in torch.autograd.grad(loss, (poisoned, weight)):
        assert torch.isfinite(g).all()


def test_bf16_loss_is_fp32_and_close():
    hidden, weight, _, labels = lm_inputs()
    loss = supervised_linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - oracle(hidden, weight, None, labels).item()) < 0.05


def test_supervised_cross_entropy_refuses_shapes():
    hidden, weight, bias, labels = lm_inputs()
    with pytest.raises(ValueError, match="labels"):
        supervised_linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="bias"):
        supervised_linear_cross_entropy(hidden, weight, labels, bias=bias[1:])


def test_importing_the_ops_needs_torch_alone():
    code = (
        "import sys, psa_fast.ops; "
        "print([m for m in ('triton', 'transformers', 'deepspeed', 'peft') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"
