"""The safety path against the official one, written here from its description in channels-first torch modules.

arXiv 2411.11543, section 3.2, and its code: Honeybee's C-Abstractor of RegNet blocks as timm builds them (bottle ratio
1, group size 1, squeeze-excite of a quarter of the block's input channels, LayerNorm over channels with eps 1e-5), then
nn.MultiheadAttention over [safety tokens ; features], then one linear head per question. Nothing of ours is imported
but what is under test; only the values of the weights are copied.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psa_fast.models import ConceptBottleneck, PsaConfig
from psa_fast.models.bottleneck import first_query, prompt_query


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [N, C, H, W], by its formula."""

    def __init__(self, channels, eps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return x * self.weight[None, :, None, None] + self.bias[None, :, None, None]


class RegNetBlock(nn.Module):
    def __init__(self, inputs, channels, reduced, eps):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, channels, 1, bias=False), ChannelNorm(channels, eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm2 = ChannelNorm(channels, eps)
        self.squeeze, self.excite = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)
        self.conv3, self.norm3 = nn.Conv2d(channels, channels, 1, bias=False), ChannelNorm(channels, eps)
        self.project = inputs != channels
        if self.project:
            self.conv4, self.norm4 = nn.Conv2d(inputs, channels, 1, bias=False), ChannelNorm(channels, eps)

    def forward(self, x):
        y = F.silu(self.norm1(self.conv1(x)))
        y = F.silu(self.norm2(self.conv2(y)))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        y = self.norm3(self.conv3(y * torch.sigmoid(gate)))
        return F.silu(y + (self.norm4(self.conv4(x)) if self.project else x))


class OfficialSafetyPath(nn.Module):
    def __init__(self, vision, width, hidden, heads, tokens, depth, reduced, side, eps):
        super().__init__()
        first, later = reduced
        self.side = side
        self.stage1 = nn.Sequential(
            *(RegNetBlock(width if i else vision, width, later if i else first, eps) for i in range(depth))
        )
        self.stage2 = nn.Sequential(*(RegNetBlock(width, width, later, eps) for _ in range(depth)))
        self.readout1, self.readout2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        self.tokens = nn.Parameter(torch.empty(tokens, hidden))
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.type_head, self.level_head = nn.Linear(hidden, 7), nn.Linear(hidden, 4)

    def forward(self, features, query):
        n, s, _ = features.shape
        grid = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = F.adaptive_avg_pool2d(self.stage1(grid), self.side)
        h_s = self.stage2(grid).flatten(2).transpose(1, 2)
        h_s = self.readout2(F.silu(self.readout1(h_s)))
        assert h_s.shape[:2] == (n, s)
        keys = torch.cat([self.tokens.expand(n, -1, -1), h_s], dim=1)
        pooled, _ = self.attention(query[:, None], keys, keys)
        return torch.cat([self.type_head(pooled[:, 0]), self.level_head(pooled[:, 0])], dim=1)


def pairs(ours, theirs, hidden):
    """(our tensor, its part, the official parameter): every parameter of either side, once."""
    found = []
    for stage in ("stage1", "stage2"):
        for block, other in zip(getattr(ours.projector, stage), getattr(theirs, stage), strict=True):
            for i in (1, 2, 3):
                found.append((getattr(block, f"conv{i}").weight, ..., getattr(other, f"conv{i}").weight))
                for part in ("weight", "bias"):
                    found.append(
                        (getattr(getattr(block, f"norm{i}"), part), ..., getattr(getattr(other, f"norm{i}"), part))
                    )
            for a, b in ((block.se.fc1, other.squeeze), (block.se.fc2, other.excite)):
                found += [(a.weight, ..., b.weight), (a.bias, ..., b.bias)]
            if other.project:
                found.append((block.downsample[0].weight, ..., other.conv4.weight))
                found += [(getattr(block.downsample[1], p), ..., getattr(other.norm4, p)) for p in ("weight", "bias")]
    attention, mha = ours.attention, theirs.attention
    found += [
        (ours.projector.expand.weight, ..., theirs.readout1.weight),
        (attention.feature_bias, ..., theirs.readout1.bias),
        (attention.readout_weight, ..., theirs.readout2.weight),
        (attention.readout_bias, ..., theirs.readout2.bias),
        (ours.head_tokens.weight, ..., theirs.tokens),
        (attention.in_proj_weight, ..., mha.in_proj_weight),
        (attention.in_proj_bias, ..., mha.in_proj_bias),
        (attention.out_proj.weight, ..., mha.out_proj.weight),
        (attention.out_proj.bias, ..., mha.out_proj.bias),
        (ours.heads.weight, slice(0, 7), theirs.type_head.weight),
        (ours.heads.weight, slice(7, 11), theirs.level_head.weight),
        (ours.heads.bias, slice(0, 7), theirs.type_head.bias),
        (ours.heads.bias, slice(7, 11), theirs.level_head.bias),
    ]
    assert {id(o) for o, _, _ in found} == {id(p) for p in ours.parameters()}
    assert {id(t) for _, _, t in found} == {id(p) for p in theirs.parameters()}
    return found


def relative(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


# squeeze-excite of a quarter: 22 / 4 = 5.5 and 26 / 4 = 6.5 both round to 6, 86 / 4 = 21.5 and 90 / 4 = 22.5 to 22
WIDTHS = {
    16: (80, (4, 20)),
    22: (86, (6, 22)),
    26: (90, (6, 22)),
    80: (80, (20, 20)),  # as wide as the stage: no projection on the shortcut
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("vision", "hidden", "heads"), [(16, 32, 8), (22, 40, 5), (26, 24, 8), (80, 48, 4)])
def test_value_and_every_gradient_are_the_official_ones(vision, hidden, heads, samples):
    torch.manual_seed(vision + samples)
    width, reduced = WIDTHS[vision]
    config = PsaConfig(
        vision, hidden, 16, num_head_tokens=6, num_attention_heads=heads, projector_hidden_size=width, query="first"
    )
    ours = ConceptBottleneck(config).double()
    theirs = OfficialSafetyPath(vision, width, hidden, heads, 6, 3, reduced, side=4, eps=1e-5).double()
    with torch.no_grad():
        for own, part, other in pairs(ours, theirs, hidden):
            # features near each other make the variance small and eps visible
            other.normal_(std=1 / math.sqrt(max(other[0].numel(), 4)))
            own[part] = other.reshape(own[part].shape)
    features = torch.randn(samples, 16, vision, dtype=torch.float64).mul_(0.05).requires_grad_()
    query = torch.randn(samples, hidden, dtype=torch.float64, requires_grad=True)
    got, expected = ours.heads(ours(features, query)), theirs(features, query)
    assert relative(got, expected) < 1e-12
    probe = torch.randn_like(expected)
    inputs = [features, query]
    g = torch.autograd.grad((got * probe).sum(), [*inputs, *ours.parameters()])
    r = torch.autograd.grad((expected * probe).sum(), [*inputs, *theirs.parameters()])
    for a, b in zip(g[:2], r[:2], strict=True):
        assert relative(a, b) < 1e-12
    own = dict(zip(map(id, ours.parameters()), g[2:], strict=True))
    other = dict(zip(map(id, theirs.parameters()), r[2:], strict=True))
    for mine, part, official in pairs(ours, theirs, hidden):
        a, b = own[id(mine)][part], other[id(official)]
        if mine is ours.attention.in_proj_bias:
            # the keys' bias adds the same to every score: its gradient is zero, rounding apart
            assert (a[hidden : 2 * hidden] == 0).all()
            assert b[hidden : 2 * hidden].abs().max() < 1e-12 * b.abs().max()
            keep = [*range(hidden), *range(2 * hidden, 3 * hidden)]
            a, b = a[keep], b[keep]
        assert relative(a.reshape(b.shape), b) < 1e-12
    # the eps that was ours until version 1 of the configuration is seen by this very test
    with torch.no_grad():
        config.layer_norm_eps = 1e-6
        before = ConceptBottleneck(config).double()
        before.load_state_dict(ours.state_dict())
        assert relative(before.heads(before(features, query)), expected) > 1e-9


def test_a_request_of_images_only_is_asked_by_the_learned_query_alone():
    torch.manual_seed(0)
    embeds = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True, True, False, False, False]])
    for query in (prompt_query, first_query):
        got = query(embeds, mask)
        assert (got[0] == 0).all()
        assert torch.isfinite(got).all()
        assert (got[1] != 0).any()
        assert (query(embeds[:1], mask)[0] == 0).all()  # a packed row
        (gradient,) = torch.autograd.grad(got.square().sum(), embeds)
        assert torch.isfinite(gradient).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (prompt_query(embeds.detach().to(dtype), mask)[0] == 0).all()
    bottleneck = ConceptBottleneck(PsaConfig(6, 8, 4, num_head_tokens=2, num_attention_heads=2, projector_depth=1))
    vision = torch.randn(2, 4, 6)
    asked = bottleneck(vision, prompt_query(embeds, mask))
    alone = bottleneck(vision, torch.zeros(2, 8))
    assert torch.isfinite(asked).all()
    torch.testing.assert_close(asked[0], alone[0])
    assert not torch.equal(asked[1], alone[1])
