"""Forward and backward of the fused ops beside what they replace. `make bench`; each op is checked before it is timed.

CPU, fp32. A ratio means something within one run only: the machine's other load is in every number.
"""

import pytest
import torch

from psa_fast.models import ConceptAttention

E, HEADS, TEXT, HEAD_TOKENS, IMAGE_TOKENS, BATCH = 1024, 8, 64, 64, 576, 2


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    official = torch.nn.MultiheadAttention(E, HEADS, batch_first=True)
    ours = ConceptAttention(E, HEADS)
    ours.load_state_dict(official.state_dict())
    text = torch.randn(BATCH, TEXT, E)
    tokens = torch.randn(HEAD_TOKENS, E, requires_grad=True)
    features = torch.randn(BATCH, IMAGE_TOKENS, E, requires_grad=True)
    return official, ours, text, tokens, features


def official_pool(attention):
    # every text position asks, one answer is used, the weights are returned: as the paper's code does it
    official, _, text, tokens, features = attention
    keys = torch.cat([tokens.expand(BATCH, -1, -1), features], dim=1)
    return official(text, keys, keys)[0][:, 0]


def absorbed_pool(attention):
    _, ours, text, tokens, features = attention
    return ours(text[:, :1], tokens, features)[:, 0]


@pytest.mark.benchmark(group="concept attention")
@pytest.mark.parametrize("pool", [official_pool, absorbed_pool])
def test_concept_attention(benchmark, attention, pool):
    torch.testing.assert_close(absorbed_pool(attention), official_pool(attention), rtol=1e-4, atol=1e-5)
    benchmark.pedantic(lambda: pool(attention).sum().backward(), rounds=5, warmup_rounds=1)
