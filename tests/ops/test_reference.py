"""The references of the ops against torch's own modules in fp64, in value and every gradient; no op is called here."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psa_fast import ops
from psa_fast.ops import reference

F64 = torch.float64


def leaves(*shapes):
    torch.manual_seed(4)
    return [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]


def assert_same(got, expected, wanted):
    """Tuples of results and, for a random incoming gradient of each, the gradients of `wanted`."""
    probes = [torch.randn_like(x) for x in expected]
    for g, x in zip(got, expected, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-12, atol=1e-12)
    found, truth = (
        torch.autograd.grad(x, wanted, probes, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (got, expected)
    )
    for g, x in zip(found, truth, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", reference.__all__)
def test_it_is_called_as_the_op_is(name):
    """The same arguments in the same order, with the same defaults; there is no choice of a backend."""
    op, plain = (
        {n: (p.kind, p.default) for n, p in inspect.signature(getattr(room, name)).parameters.items()}
        for room in (ops, reference)
    )
    del op["backend"]
    assert list(plain.items()) == list(op.items())
    assert sorted(reference.__all__) == sorted(n for n in ops.__all__ if n.islower())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("b", "q", "s0", "s1", "e", "heads"),
    [(3, 2, 5, 7, 12, 3), (1, 1, 0, 5, 4, 1), (2, 3, 4, 0, 8, 8), (5, 1, 8, 6, 34, 17)],
)
def test_attention_pool_is_linear_and_multihead_attention(b, q, s0, s1, e, heads, full):
    query, tokens, features, feature_bias = leaves((b, q, e), (s0, e), (b, s1, e), (e,))
    mha, linear = nn.MultiheadAttention(e, heads, batch_first=True, dtype=F64), nn.Linear(e, e, dtype=F64)
    nn.init.normal_(mha.in_proj_bias)
    mask = torch.rand(b, s1) < 0.6
    mask[:, :1] = True
    keys = torch.cat([tokens.expand(b, -1, -1), linear(F.silu(features + feature_bias)) if full else features], 1)
    padding = torch.cat([mask.new_zeros(b, s0), ~mask], 1) if full else None
    expected = mha(query, keys, keys, key_padding_mask=padding, need_weights=False)[0]
    options = {
        "features_mask": mask,
        "feature_bias": feature_bias,
        "activation": "silu",
        "readout_weight": linear.weight,
        "readout_bias": linear.bias,
    }
    heads_outputs = reference.attention_pool(
        query, features, mha.in_proj_weight, mha.in_proj_bias, heads, tokens=tokens, **(options if full else {})
    )
    wanted = [query, tokens, features, feature_bias, *linear.parameters(), *mha.parameters()]
    assert_same([mha.out_proj(heads_outputs)], [expected], wanted)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("b", "r", "s0", "s1", "e"), [(3, 4, 5, 7, 12), (1, 1, 1, 1, 1), (2, 3, 0, 9, 8), (2, 8, 4, 0, 8)]
)
def test_concept_pool_is_scaled_dot_product_attention(b, r, s0, s1, e, full):
    """Keys = values are [token, 0, 0] and [0, x, 1]: the last channel brings the offset in and the mass out."""
    tokens, features, token_query, feature_query, offset, bias = inputs = leaves(
        (s0, e), (b, s1, e), (b, r, e), (b, r, e), (b, r), (e,)
    )
    mask = torch.rand(b, s1) < 0.6
    mask[:, :1] = True
    x = nn.SiLU()(features + bias) if full else features
    keys = [F.pad(tokens.expand(b, -1, -1), (0, e + 1)), torch.cat([F.pad(x, (e, 0)), x.new_ones(b, s1, 1)], -1)]
    keys = torch.cat(keys, 1)
    query = torch.cat([token_query, feature_query, offset.unsqueeze(-1) * full], -1)
    taken = torch.cat([mask.new_ones(b, s0), mask], 1).unsqueeze(1) if full else None
    out = F.scaled_dot_product_attention(query, keys, keys, attn_mask=taken, scale=1.0)
    expected = (out[..., :e], out[..., e : 2 * e], out[..., 2 * e])
    options = {"feature_offset": offset, "feature_bias": bias, "activation": "silu", "features_mask": mask}
    got = reference.concept_pool(tokens, features, token_query, feature_query, **(options if full else {}))
    assert_same(got, expected, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_items", [None, 7.5, torch.tensor(3), torch.tensor([2.0, 5.0])])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_concept_loss_is_the_cross_entropy_of_every_slice(smoothing, weighted, num_items, ignore_index):
    pooled, weight, bias = inputs = leaves((5, 9), (11, 9), (11,))
    targets = torch.tensor([[0, 3], [6, -100], [2, 1], [-100, 0], [6, 2]])
    targets[targets == -100] = ignore_index
    w = torch.rand(11, dtype=F64) + 0.1 if weighted else None
    logits = nn.functional.linear(pooled, weight, bias)
    losses = []
    for h, part in enumerate((slice(0, 7), slice(7, 11))):
        loss = nn.CrossEntropyLoss(
            None if w is None else w[part],
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction="mean" if num_items is None else "sum",
        )(logits[:, part], targets[:, h])
        losses.append(loss if num_items is None else loss / torch.as_tensor(num_items).expand(2)[h])
    expected = (sum(losses), torch.stack(losses), logits)
    got = reference.concept_loss(*inputs, targets, (7, 4), w, smoothing, ignore_index, num_items)
    assert_same(got, expected, inputs)
    if weighted:
        split = reference.concept_loss(*inputs, targets, (7, 4), w.split((7, 4)), smoothing, ignore_index, num_items)
        assert_same(split, expected, inputs)


@pytest.mark.parametrize("num_items", [None, 0, 3, torch.tensor(0.0)])
@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_label_a_loss_is_a_connected_zero(rows, num_items):
    pooled, weight, bias = inputs = leaves((rows, 9), (11, 9), (11,))
    nothing = torch.full((rows, 2), -100)
    for loss in (
        reference.concept_loss(*inputs, nothing, num_items=num_items)[0],
        reference.supervised_linear_cross_entropy(pooled, weight, nothing[:, 0], bias=bias, num_items=num_items),
    ):
        assert loss.item() == 0
        for g, x in zip(torch.autograd.grad(loss, inputs), inputs, strict=True):
            assert torch.equal(g, torch.zeros_like(x))


@pytest.mark.parametrize("num_items", [None, 7.5, torch.tensor(21)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_supervised_linear_cross_entropy_is_that_of_full_logits(with_bias, weighted, num_items, ignore_index):
    hidden, weight, bias = inputs = leaves((3, 6, 5), (13, 5), (13,))
    labels = torch.randint(0, 13, (3, 6)).masked_fill(torch.rand(3, 6) > 0.5, ignore_index)
    labels[0, 0] = 12
    token_weights = torch.rand(3, 6, dtype=F64) if weighted else None
    logits = F.linear(hidden, weight, bias if with_bias else None)
    rows = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
    rows = rows if token_weights is None else rows * token_weights.flatten()
    expected = rows.sum() / ((labels != ignore_index).sum() if num_items is None else num_items)
    got = reference.supervised_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias if with_bias else None,
        ignore_index=ignore_index,
        token_weights=token_weights,
        num_items=num_items,
    )
    assert_same([got], [expected], inputs)
    if not weighted and num_items is None:
        mean = nn.CrossEntropyLoss(ignore_index=ignore_index)(logits.flatten(0, 1), labels.flatten())
        assert_same([got], [mean], inputs)
