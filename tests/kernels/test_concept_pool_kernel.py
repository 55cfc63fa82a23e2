"""The pool kernels against the op's reference in fp64: in Triton's interpreter, or on a GPU."""

import contextlib
import functools

import pytest
import torch

from psa_fast.ops import attention_pool, concept_pool, reference

pytest.importorskip("triton")

KERNELS = functools.partial(concept_pool, backend="triton")


def draw(device, dtype, b, r, s0, s1, e, full):
    g = torch.Generator().manual_seed(0)
    shapes = [(s0, e), (b, s1, e), (b, r, e), (b, r, e)] + ([(b, r), (e,)] if full else [])
    scales = [1, 1, 2 * e**-0.5, 2 * e**-0.5, 1, 1]
    inputs = [(torch.randn(s, generator=g) * c).to(device, dtype) for s, c in zip(shapes, scales, strict=False)]
    mask = (torch.rand(b, s1, generator=g) < 0.6).to(device) if full else None
    if mask is not None:
        mask[:, :1] = True
    return inputs + [None] * (6 - len(inputs)), mask


def run(inputs, mask, form):
    """Results and gradients of the op or of its reference."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    *five, bias = leaves
    out = form(*five, feature_bias=bias, activation=None if bias is None else "silu", features_mask=mask)
    return out, gradients(out, leaves)


def gradients(out, leaves):
    g = torch.Generator().manual_seed(1)
    probes = [torch.randn(x.shape, generator=g).to(x.device, x.dtype) for x in out]
    wanted = [x for x in leaves if x is not None]
    return torch.autograd.grad(out, wanted, probes, allow_unused=True, materialize_grads=True)


def exact(inputs, mask):
    return run([None if x is None else x.double() for x in inputs], mask, reference.concept_pool)


# keys and channels below, at, just above and more than twice a block; primes; one of everything
SHAPES = [
    (1, 1, 1, 1, 1), (2, 3, 5, 37, 20), (1, 16, 0, 16, 64), (2, 8, 17, 31, 65), (1, 2, 33, 0, 7), (3, 5, 16, 67, 131),
]  # fmt: skip


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels have no fp64 products on a GPU")
def test_interpreted_kernels_are_exact_in_fp64(shape, full):
    inputs, mask = draw("cpu", torch.float64, *shape, full)
    with uninitialised_memory_is_nan():
        got, grads = run(inputs, mask, KERNELS)
    expected, truth = exact(inputs, mask)
    for g, x in zip((*got, *grads), (*expected, *truth), strict=True):
        torch.testing.assert_close(g, x, rtol=1e-10, atol=1e-10)


@contextlib.contextmanager
def uninitialised_memory_is_nan():
    """Every torch.empty is filled with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def within_budget(inputs, mask):
    """Each result's error is at most twice that of the reference in the same dtype, plus its rounding."""
    got, grads = run(inputs, mask, KERNELS)
    plain, plain_grads = run(inputs, mask, reference.concept_pool)
    expected, truth = exact(inputs, mask)
    eps = torch.finfo(inputs[1].dtype).eps
    if inputs[1].dtype == torch.float32:
        # exact fp32 products are added one after the other, where cuBLAS splits the sum: the root of its length counts
        eps *= inputs[1].shape[-1] ** 0.5
    for g, low, x in zip((*got, *grads), (*plain, *plain_grads), (*expected, *truth), strict=True):
        if x.numel():
            error, allowed = (g.double() - x).abs().max(), (low.double() - x).abs().max()
            assert error <= 2 * allowed + eps * x.abs().max(), (error, allowed)  # False for NaN too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_budget(device, dtype):
    inputs, mask = draw(device, dtype, 2, 24 if dtype == torch.float16 else 8, 5, 50, 72, True)
    within_budget(inputs, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 8, 64, 576, 4096), (2, 8, 8, 577, 1088), (3, 13, 0, 1000, 5120), *SHAPES[1:]])
def test_error_budget_on_every_shape_and_the_same_bits_twice(dtype, shape, full):
    inputs, mask = draw("cuda", dtype, *shape, full)
    with uninitialised_memory_is_nan():
        within_budget(inputs, mask)
    (first, first_grads), (again, again_grads) = (run(inputs, mask, KERNELS) for _ in range(2))
    for a, b in zip((*first, *first_grads), (*again, *again_grads), strict=True):
        assert torch.equal(a, b)


def test_attention_pool_on_the_kernels(device):
    """The composition around the kernels, with an absorbed readout."""
    g = torch.Generator().manual_seed(0)
    e = 24
    in_torch = functools.partial(attention_pool, backend="torch")
    # in fp32 projections that are absorbed round otherwise than projected keys do: only the torch form is as close
    dtype, tolerance, form = (
        (torch.float32, 1e-4, in_torch) if device == "cuda" else (torch.float64, 1e-9, reference.attention_pool)
    )
    shapes = [(2, 2, e), (2, 19, e), (3 * e, e), (3 * e,), (5, e), (e,), (e, e), (e,)]
    leaves = [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]

    def pool(form):
        query, features, weight, bias, tokens, feature_bias, readout_weight, readout_bias = leaves
        out = form(
            query, features, weight, bias, 4, tokens=tokens, feature_bias=feature_bias, activation="silu",
            readout_weight=readout_weight, readout_bias=readout_bias,
        )  # fmt: skip
        return out, *gradients([out], leaves)

    for got, expected in zip(pool(functools.partial(attention_pool, backend="triton")), pool(form), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_too_many_rows_are_refused_and_auto_says_so_by_working(device):
    inputs, mask = draw(device, torch.float32, 1, 17, 2, 3, 4, False)
    with pytest.raises(ValueError, match="at most 16 rows"):
        run(inputs, mask, KERNELS)
    run(inputs, mask, concept_pool)
