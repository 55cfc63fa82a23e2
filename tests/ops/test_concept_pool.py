"""concept_pool against its reference and the absorbed readout against torch's modules in fp64; opcheck."""

import os

import pytest
import torch
from torch import nn

from psa_fast.ops import attention_pool, concept_pool, pool, reference


def draw(b=3, r=4, s0=5, s1=7, e=12, dtype=torch.float64, full=True):
    torch.manual_seed(0)
    shapes = [(s0, e), (b, s1, e), (b, r, e), (b, r, e)] + ([(b, r), (e,)] if full else [])
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    mask = torch.rand(b, s1) < 0.6 if full else None
    return inputs + [None] * (6 - len(inputs)), mask


def ours(inputs, silu, mask, form=concept_pool):
    *five, bias = inputs
    return form(*five, feature_bias=bias, activation="silu" if silu else None, features_mask=mask)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("b", "r", "s0", "s1", "e"), [(3, 4, 5, 7, 12), (1, 1, 1, 1, 1), (2, 3, 0, 9, 8), (2, 8, 4, 0, 8), (5, 2, 8, 6, 34)]
)
def test_equals_the_reference_in_value_and_every_gradient(b, r, s0, s1, e, full, monkeypatch):
    monkeypatch.setattr(pool, "_CHUNK_ELEMENTS", 2 * s1 * e)  # several chunks, the last one short
    inputs, mask = draw(b, r, s0, s1, e, full=full)
    if s0 == 0 and mask is not None:
        mask[:, 0] = True
    wanted = [x for x in inputs if x is not None]
    got, expected = ours(inputs, full, mask), ours(inputs, full, mask, reference.concept_pool)
    probes = [torch.randn_like(x) for x in expected]
    for g, x in zip(got, expected, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got, wanted, probes)
    truth = torch.autograd.grad(expected, wanted, probes, allow_unused=True, materialize_grads=True)
    for g, x in zip(grads, truth, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-11, atol=1e-11)


def test_opcheck_and_gradcheck():
    inputs, mask = draw(2, 2, 3, 4, 6)
    *five, bias = inputs
    assert torch.autograd.gradcheck(lambda *a: tuple(ours(a, True, mask)), tuple(inputs))
    torch.library.opcheck(torch.ops.psa_fast.concept_pool.default, (*five, bias, True, mask, "torch"))
    plain, _ = draw(2, 2, 3, 4, 6, full=False)
    torch.library.opcheck(torch.ops.psa_fast.concept_pool.default, (*plain, False, None, "torch"))


class Readout(nn.Module):
    """The unfused end of the projector and the pooling head after it: torch's own modules only."""

    def __init__(self, e, heads):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(e))
        self.linear = nn.Linear(e, e)
        self.attention = nn.MultiheadAttention(e, heads, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, query, tokens, features, mask=None):
        x = self.linear(nn.functional.silu(features + self.bias))
        keys = torch.cat([tokens.expand(x.shape[0], -1, -1), x], dim=1)
        padding = None if mask is None else torch.cat([mask.new_zeros(mask.shape[0], tokens.shape[0]), ~mask], dim=1)
        return self.attention(query, keys, keys, key_padding_mask=padding, need_weights=False)[0]

    def fused(self, query, tokens, features, mask=None, backend="auto"):
        a = self.attention
        pooled = attention_pool(
            query,
            features,
            a.in_proj_weight,
            a.in_proj_bias,
            a.num_heads,
            tokens=tokens,
            features_mask=mask,
            feature_bias=self.bias,
            activation="silu",
            readout_weight=self.linear.weight,
            readout_bias=self.linear.bias,
            backend=backend,
        )
        return a.out_proj(pooled)


@pytest.mark.parametrize(
    ("b", "q", "s0", "s1", "e", "heads"), [(3, 2, 5, 7, 12, 3), (1, 1, 0, 5, 4, 1), (2, 1, 2, 9, 40, 5)]
)
def test_an_absorbed_readout_equals_linear_and_multihead_attention(b, q, s0, s1, e, heads):
    torch.manual_seed(0)
    module = Readout(e, heads).double()
    shapes = ((b, q, e), (s0, e), (b, s1, e))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mask = torch.rand(b, s1) < 0.6
    mask[:, 0] = True
    wanted = inputs + list(module.parameters())
    got, expected = module.fused(*inputs, mask), module(*inputs, mask)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    grads, references = (torch.autograd.grad(x, wanted, probe) for x in (got, expected))
    for g, x in zip(grads, references, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("readout", [False, True])
def test_attention_pool_under_opcheck_and_compile(readout):
    torch.manual_seed(0)
    module = Readout(8, 2)
    query, tokens, features = (torch.randn(s, requires_grad=True) for s in ((2, 1, 8), (3, 8), (2, 5, 8)))
    a, last = module.attention, module.linear
    extra = (module.bias, last.weight, last.bias) if readout else (None, None, None)
    args = (query, tokens if readout else None, features, a.in_proj_weight, a.in_proj_bias, *extra, None, 2, readout)
    torch.library.opcheck(torch.ops.psa_fast.attention_pool.default, (*args, "torch"))
    compiled = torch.compile(module.fused, fullgraph=True, backend="aot_eager")
    wanted = [query, tokens, features, *module.parameters()]
    got, expected = compiled(query, tokens, features), module(query, tokens, features)
    torch.testing.assert_close(got, expected)
    for g, x in zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
        torch.testing.assert_close(g, x)


@pytest.mark.gpu
def test_gpu_opcheck_and_inductor():
    """What inductor is told about the kernels' results (strides, dtypes) is what they return."""
    inputs, mask = draw(2, 4, 3, 20, 32, dtype=torch.float32)
    args = [None if x is None else x.detach().to("cuda").requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.psa_fast.concept_pool.default, (*args, True, mask.to("cuda"), "triton"))
    module = Readout(32, 4).to("cuda")
    shapes = (2, 1, 32), (3, 32), (2, 20, 32)
    query, tokens, features = (torch.randn(s, device="cuda", requires_grad=True) for s in shapes)
    got = torch.compile(module.fused, fullgraph=True)(query, tokens, features, None, "triton")
    expected = module.fused(query, tokens, features, None, "triton")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    wanted = [query, tokens, features, *module.parameters()]
    for g, x in zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
        torch.testing.assert_close(g, x, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    inputs, mask = draw()
    with pytest.raises(ValueError, match=r"token_query must be \[3, 5, 12\]"):
        ours([inputs[0], inputs[1], torch.zeros(3, 5, 13), *inputs[3:]], True, mask)
    with pytest.raises(ValueError, match="activation"):
        concept_pool(*inputs[:4], activation="gelu")
    with pytest.raises(ValueError, match="backend must be"):
        concept_pool(*inputs[:4], backend="cuda")
    x = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="readout_weight"):
        attention_pool(x, x, torch.zeros(12, 4), torch.zeros(12), 2, readout_bias=torch.zeros(4))
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        many = torch.zeros(65536, 1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
        with pytest.raises(ValueError, match="65535 samples"):
            concept_pool(many[0], many, many, many, backend="triton")
