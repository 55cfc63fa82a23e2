"""The row kernel alone (in Triton's interpreter on a CPU): loss and gradient against F.cross_entropy in fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from psa_kernels.supervised_linear_cross_entropy import BLOCK_V, cross_entropy_rows_

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3}


def run(
    rows,
    vocabulary,
    device,
    dtype=torch.float64,
    pad=0,
    with_bias=True,
    weighted=True,
    spread=3.0,
    own_padding=False,
    **options,
):
    """Loss and gradient of the kernel, and of the oracle on the same (rounded) logits.

    `pad` columns beyond the vocabulary are somebody else's, or with `own_padding` the kernel's and full of NaN.
    """
    torch.manual_seed(rows * 1009 + vocabulary)
    logits = (torch.randn(rows, vocabulary + pad, device=device, dtype=torch.float64) * spread).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    bias = torch.randn(vocabulary, device=device, dtype=wide) if with_bias else None
    weights = torch.rand(rows, device=device, dtype=wide) if weighted else None
    labels = torch.randint(vocabulary, (rows,), device=device)
    labels[:1], labels[1:2] = vocabulary - 1, 0
    exact = logits[:, :vocabulary].double().requires_grad_()
    shifted = exact if bias is None else exact + bias
    expected = F.cross_entropy(shifted, labels, reduction="none")
    if weights is not None:
        expected = expected * weights
    expected.sum().backward()
    loss = torch.full((rows,), float("nan"), device=device, dtype=wide)
    if own_padding:
        logits[:, vocabulary:] = float("nan")
        bias = None if bias is None else F.pad(bias, (0, pad))
        cross_entropy_rows_(logits, vocabulary, labels, loss, bias=bias, weights=weights, **options)
    else:
        beyond = logits[:, vocabulary:].clone()
        cross_entropy_rows_(logits[:, :vocabulary], vocabulary, labels, loss, bias=bias, weights=weights, **options)
        assert torch.equal(logits[:, vocabulary:], beyond)
    return loss, logits[:, :vocabulary], expected.detach(), exact.grad


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 31, 32, 33, 47, 97])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_block_edge(device, rows, vocabulary):
    loss, gradient, expected, expected_gradient = run(rows, vocabulary, device, pad=vocabulary % 3, block_v=16)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_dtypes_and_options(device, dtype, with_bias, weighted):
    loss, gradient, expected, expected_gradient = run(
        5, 67, device, dtype=dtype, with_bias=with_bias, weighted=weighted, block_v=32
    )
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss_tolerance = min(TOLERANCE[dtype], 2e-6)  # whatever the logits' dtype, logsumexp is at least fp32
    torch.testing.assert_close(loss.double(), expected, rtol=loss_tolerance, atol=loss_tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("vocabulary", [BLOCK_V - 1, BLOCK_V, BLOCK_V + 1, 2 * BLOCK_V + 13])
def test_shipped_block(device, vocabulary):
    loss, gradient, expected, expected_gradient = run(2, vocabulary, device, dtype=torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 8191, 32001])
@pytest.mark.parametrize("with_bias", [False, True])
def test_padding_counts_for_nothing(device, vocabulary, with_bias):
    loss, gradient, expected, expected_gradient = run(
        3, vocabulary, device, pad=-vocabulary % 64, with_bias=with_bias, own_padding=True
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pad", [1, 64, 65, 200])
def test_padding_of_any_width(device, pad):
    loss, gradient, expected, expected_gradient = run(2, 19, device, pad=pad, own_padding=True, block_v=16)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_without_gradient_the_logits_stay(device):
    logits = torch.randn(3, 19, device=device)
    before, loss = logits.clone(), torch.empty(3, device=device)
    labels = torch.tensor([0, 18, 7], device=device)
    cross_entropy_rows_(logits, logits.shape[1], labels, loss, write_grad=False, block_v=8)
    assert torch.equal(logits, before)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("bad", [-1, -100, 19, 2**40])
def test_a_label_outside_the_vocabulary_is_nan_in_its_row_only(device, bad):
    logits = torch.randn(3, 19, device=device)
    loss = torch.zeros(3, device=device)
    cross_entropy_rows_(logits, logits.shape[1], torch.tensor([0, bad, 7], device=device), loss, block_v=8)
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.isnan().any(1).tolist() == [False, True, False]


def test_large_logits_and_a_masked_block(device):
    """No overflow at 1e4; -inf over whole blocks (a masked part of the vocabulary) leaves the rest exact."""
    loss, gradient, expected, expected_gradient = run(3, 40, device, spread=1e4, block_v=16)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    logits = torch.randn(2, 40, device=device, dtype=torch.float64)
    bias = torch.zeros(40, device=device, dtype=torch.float64)
    bias[:17] = bias[36:] = float("-inf")
    labels = torch.tensor([17, 30], device=device)
    expected = F.cross_entropy(logits + bias, labels, reduction="none")
    loss = torch.empty(2, device=device, dtype=torch.float64)
    cross_entropy_rows_(logits, logits.shape[1], labels, loss, bias=bias, block_v=16)
    torch.testing.assert_close(loss, expected)
    assert (logits[:, :17] == 0).all()
    assert logits.isfinite().all()


def test_no_rows(device):
    empty = torch.empty(0, 19, device=device)
    cross_entropy_rows_(
        empty, empty.shape[1], torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [7, 4096, 32003, 128256])
def test_gpu_rows(dtype, vocabulary):
    loss, gradient, expected, expected_gradient = run(64, vocabulary, "cuda", dtype=dtype, pad=5)
    again = run(64, vocabulary, "cuda", dtype=dtype, pad=5)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    # one rounding to the logits' dtype, below its smallest normal number an absolute one; p - 1 cancels at the label,
    # where p is known as well as logsumexp is: it is below 20 here, so half an eps of 32 at worst
    relative, tiny = max(torch.finfo(dtype).eps, tolerance), torch.finfo(dtype).tiny
    at_label = expected_gradient < 0
    for where, absolute in ((~at_label, tiny), (at_label, max(tiny, 16 * torch.finfo(loss.dtype).eps))):
        torch.testing.assert_close(gradient[where].double(), expected_gradient[where], rtol=relative, atol=absolute)
