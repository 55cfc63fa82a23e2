"""attention_pool against nn.MultiheadAttention in fp64, and its edge cases."""

import pytest
import torch
from torch import nn

from psa_fast.ops import attention_pool


def pool(query, tokens, features, weight, bias, heads, mask=None):
    return attention_pool(query, features, weight, bias, heads, tokens=tokens, features_mask=mask)


def official(query, tokens, features, mha, mask=None):
    keys = torch.cat([tokens.expand(features.shape[0], -1, -1), features], dim=1)
    padding = None
    if mask is not None:
        padding = torch.cat([mask.new_zeros(mask.shape[0], tokens.shape[0]), ~mask], dim=1)
    return mha(query, keys, keys, key_padding_mask=padding, need_weights=False)[0]


def ours(query, tokens, features, mha, mask=None):
    return mha.out_proj(pool(query, tokens, features, mha.in_proj_weight, mha.in_proj_bias, mha.num_heads, mask))


def draw(b=3, q=2, s0=5, s1=7, e=12, heads=3, dtype=torch.float64):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(e, heads, batch_first=True, dtype=dtype)
    nn.init.normal_(mha.in_proj_bias)
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((b, q, e), (s0, e), (b, s1, e))]
    return mha, inputs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("b", "q", "s0", "s1", "e", "heads"),
    [(3, 2, 5, 7, 12, 3), (1, 1, 1, 1, 4, 1), (2, 1, 0, 9, 40, 5), (2, 3, 4, 0, 8, 8), (5, 1, 8, 6, 34, 17)],
)
def test_equals_multihead_attention_in_value_and_every_gradient(b, q, s0, s1, e, heads, masked):
    mha, inputs = draw(b, q, s0, s1, e, heads)
    mask = None
    if masked and s1 > 1:
        mask = torch.rand(b, s1) < 0.5
        mask[:, 0] = True
    probe = torch.randn(b, q, e, dtype=torch.float64)
    wanted = inputs + list(mha.parameters())
    expected = official(*inputs, mha, mask)
    got = ours(*inputs, mha, mask)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((got * probe).sum(), wanted)
    references = torch.autograd.grad((expected * probe).sum(), wanted)
    for g, r in zip(grads, references, strict=True):
        torch.testing.assert_close(g, r, rtol=1e-11, atol=1e-11)
    bias_grad = grads[4]
    assert bias_grad.shape == (3 * e,)
    assert (bias_grad[e : 2 * e] == 0).all()


def test_gradcheck_with_mask_and_autocast_on():
    mha, inputs = draw(2, 2, 3, 4, 6, 2)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    args = (*inputs, mha.in_proj_weight, mha.in_proj_bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.autograd.gradcheck(lambda *a: pool(*a, 2, mask), args)


def test_a_fully_masked_sample_sees_the_tokens_only():
    mha, (query, tokens, features) = draw(2, 1)
    mask = torch.tensor([[False] * 7, [True] * 7])
    got = ours(query, tokens, features, mha, mask)
    alone = ours(query[:1], tokens, features[:1, :0], mha)
    torch.testing.assert_close(got[:1], alone, rtol=1e-12, atol=1e-12)
    grad = torch.autograd.grad(got.sum(), features)[0]
    assert (grad[0] == 0).all()
    assert torch.isfinite(grad).all()


def test_expanded_and_transposed_inputs_and_gradients():
    mha, (query, tokens, features) = draw(4, 2)
    strange = [
        query[:1].detach().expand(4, -1, -1),
        tokens.detach().t().contiguous().t(),
        features.detach().transpose(1, 2).contiguous().transpose(1, 2)[:1].expand(4, -1, -1),
    ]
    for t in strange:
        t.requires_grad_()
    plain = [t.detach().contiguous().clone().requires_grad_() for t in strange]
    got, expected = ours(*strange, mha), ours(*plain, mha)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for g, r in zip(  # sum() hands down an expanded gradient
        torch.autograd.grad(got.sum(), strange), torch.autograd.grad(expected.sum(), plain), strict=True
    ):
        torch.testing.assert_close(g, r, rtol=1e-12, atol=1e-12)


def test_empty_batch_gives_zero_gradients():
    mha, inputs = draw(0, 1)
    wanted = [*inputs, mha.in_proj_weight, mha.in_proj_bias]
    grads = torch.autograd.grad(ours(*inputs, mha).sum(), wanted)
    for g, w in zip(grads, wanted, strict=True):
        assert g.shape == w.shape
        assert (g == 0).all()


def test_frozen_inputs_cost_nothing_and_get_nothing():
    mha, (query, tokens, features) = draw()
    mha.requires_grad_(False)
    got = ours(query.detach(), tokens, features.detach(), mha)
    reference = torch.autograd.grad(official(query, tokens, features, mha).sum(), tokens)[0]
    torch.testing.assert_close(torch.autograd.grad(got.sum(), tokens)[0], reference, rtol=1e-11, atol=1e-11)


def test_bf16_features_with_fp32_weights_keep_to_the_dtype_of_the_features():
    mha, inputs = draw(dtype=torch.float32)
    low = [inputs[0], inputs[1], inputs[2].detach().bfloat16().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(*low, mha)
    assert got.dtype == torch.bfloat16
    grads = torch.autograd.grad(got.float().sum(), [*low, mha.in_proj_weight])
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    expected = official(*inputs, mha)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_shapes_that_do_not_fit_are_refused():
    mha, (query, tokens, features) = draw()
    w, bias = mha.in_proj_weight, mha.in_proj_bias
    with pytest.raises(ValueError, match="divisible"):
        pool(query, tokens, features, w, bias, 5)
    with pytest.raises(ValueError, match="features must be"):
        pool(query[:1], tokens, features, w, bias, 3)
    with pytest.raises(ValueError, match="features_mask"):
        pool(query, tokens, features, w, bias, 3, torch.ones(3, 7))
    with pytest.raises(ValueError, match="in_proj_weight"):
        pool(query, tokens, features, w[:12], bias, 3)


def test_replaces_the_attention_of_a_pooling_head():
    """The example of docs/ops/attention_pool.md on a pooling head that others use."""
    pytest.importorskip("transformers")
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    torch.manual_seed(0)
    config = SiglipVisionConfig(hidden_size=24, intermediate_size=32, num_attention_heads=4)
    head = SiglipMultiheadAttentionPoolingHead(config).double()
    hidden = torch.randn(3, 10, 24, dtype=torch.float64)
    expected = head(hidden)
    a = head.attention
    probe = head.probe.expand(3, -1, -1)
    pooled = a.out_proj(attention_pool(probe, hidden, a.in_proj_weight, a.in_proj_bias, a.num_heads))
    got = pooled + head.mlp(head.layernorm(pooled))
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-11, atol=1e-11)
