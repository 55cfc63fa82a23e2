"""ConceptAttention is nn.MultiheadAttention; the projector is the C-Abstractor built from torch's own convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psa_fast.models import ConceptAttention, ConceptReadout, PsaConfig, SafetyProjector, SafetyTokens


@pytest.mark.parametrize(("e", "heads", "q"), [(40, 5, 1), (32, 8, 3), (51, 17, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_multihead_attention(e, heads, q, masked):
    torch.manual_seed(0)
    ours, theirs = ConceptAttention(e, heads).double(), nn.MultiheadAttention(e, heads, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, q, e), (4, e), (3, 10, e))]
    query, tokens, features = inputs
    mask = torch.rand(3, 10) < 0.6 if masked else None
    keys = torch.cat([tokens.expand(3, -1, -1), features], 1)
    padding = None if mask is None else torch.cat([torch.zeros(3, 4, dtype=torch.bool), ~mask], 1)
    expected = theirs(query, keys, keys, key_padding_mask=padding)[0]
    got = ours(query, tokens, features, mask)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if not masked:
        torch.testing.assert_close(ours.weights(query, tokens, features), theirs(query, keys, keys)[1].detach())
    probe = torch.randn_like(got)
    g = torch.autograd.grad((got * probe).sum(), [*inputs, *ours.parameters()])
    r = torch.autograd.grad((expected * probe).sum(), [*inputs, *theirs.parameters()])
    for a, b in zip(g, r, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    key_bias = ours.in_proj_bias
    (got * probe).sum()
    ours(query, tokens, features, mask).sum().backward()
    assert (key_bias.grad[e : 2 * e] == 0).all()


def test_readout_is_silu_linear_and_multihead_attention():
    torch.manual_seed(0)
    ours = ConceptReadout(20, 5).double()
    theirs = nn.MultiheadAttention(20, 5, batch_first=True).double()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith(("feature", "readout"))})
    query, tokens, x = (torch.randn(s, dtype=torch.float64) for s in ((3, 1, 20), (4, 20), (3, 9, 20)))
    features = F.linear(F.silu(x + ours.feature_bias), ours.readout_weight, ours.readout_bias)
    keys = torch.cat([tokens.expand(3, -1, -1), features], 1)
    expected, weights = theirs(query, keys, keys)
    torch.testing.assert_close(ours(query, tokens, x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.weights(query, tokens, x), weights, rtol=1e-11, atol=1e-11)


def test_initialisation_survives_a_meta_build():
    with torch.device("meta"):
        modules = [ConceptAttention(16, 2), ConceptReadout(16, 2), SafetyTokens(5, 16)]
    for module in modules:
        module.to_empty(device="cpu")
        for p in module.parameters():
            p.data.fill_(float("nan"))
        module.reset_parameters()
        assert all(torch.isfinite(p).all() for p in module.parameters())
    assert 0.01 < SafetyTokens(64, 64).weight.std().item() < 0.03
    assert SafetyTokens(5, 16)(3).stride(0) == 0


class ChannelsFirstBlock(nn.Module):
    """timm's RegNet bottleneck (bottle_ratio 1, group_size 1, se_ratio 0.25) written out with Conv2d."""

    def __init__(self, block, cin, cout):
        super().__init__()
        conv = dict(bias=False, dtype=torch.float64)
        self.convs = [nn.Conv2d(cin, cout, 1, **conv), nn.Conv2d(cout, cout, 3, padding=1, groups=cout, **conv)]
        self.convs.append(nn.Conv2d(cout, cout, 1, **conv))
        for mine, weight in zip(self.convs, (block.conv1.weight, block.conv2.weight, block.conv3.weight), strict=True):
            mine.weight.data = weight.detach().reshape(mine.weight.shape)
        reduced = round(cin * 0.25)
        self.fc = [nn.Conv2d(cout, reduced, 1, dtype=torch.float64), nn.Conv2d(reduced, cout, 1, dtype=torch.float64)]
        for mine, other in zip(self.fc, (block.se.fc1, block.se.fc2), strict=True):
            mine.weight.data = other.weight.detach().reshape(mine.weight.shape)
            mine.bias.data = other.bias.detach()
        self.block, self.shortcut = block, None
        if cin != cout:
            self.shortcut = nn.Conv2d(cin, cout, 1, **conv)
            self.shortcut.weight.data = block.downsample[0].weight.detach().reshape(self.shortcut.weight.shape)

    @staticmethod
    def norm(x, layer):
        return F.layer_norm(x.permute(0, 2, 3, 1), layer.weight.shape, layer.weight, layer.bias, 1e-5).permute(
            0, 3, 1, 2
        )

    def forward(self, x):
        y = F.silu(self.norm(self.convs[0](x), self.block.norm1))
        y = F.silu(self.norm(self.convs[1](y), self.block.norm2))
        y = y * torch.sigmoid(self.fc[1](F.silu(self.fc[0](F.adaptive_avg_pool2d(y, 1)))))
        y = self.norm(self.convs[2](y), self.block.norm3)
        skip = x if self.shortcut is None else self.norm(self.shortcut(x), self.block.downsample[1])
        return F.silu(y + skip)


def test_projector_is_the_c_abstractor():
    torch.manual_seed(0)
    projector = SafetyProjector(12, 10, width=20, depth=2).double()
    for name, p in projector.named_parameters():
        if "norm" in name or "downsample.1" in name:
            nn.init.normal_(p)
    x = torch.randn(3, 25, 12, dtype=torch.float64)
    y = x.transpose(1, 2).reshape(3, 12, 5, 5)
    blocks = [*projector.stage1, *projector.stage2]
    for block, (cin, cout) in zip(blocks, [(12, 20), (20, 20), (20, 20), (20, 20)], strict=True):
        y = ChannelsFirstBlock(block, cin, cout)(y)
    y = F.adaptive_avg_pool2d(y, (5, 5)).flatten(2).transpose(1, 2)
    y = F.linear(y, projector.expand.weight)
    torch.testing.assert_close(projector(x), y, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="square"):
        projector(x[:, :24])


def test_projector_size_at_7b():
    """Widths come from the config: 1024 -> 1088 -> 4096, three blocks per stage."""
    with torch.device("meta"):
        projector = SafetyProjector(1024, 4096, width=1088, depth=3)
    count = sum(p.numel() for p in projector.parameters())
    c, d = 1088, 1024
    block = lambda cin, r: cin * c + c * 9 + c * c + 6 * c + (2 * c * r + r + c)  # noqa: E731
    stage1 = block(d, 256) + (d * c + 2 * c) + 2 * block(c, 272)
    assert count == stage1 + 3 * block(c, 272) + c * 4096


def test_config_round_trip_and_refusals(tmp_path):
    config = PsaConfig(vision_hidden_size=24, hidden_size=40, image_tokens=16, num_attention_heads=5)
    assert config.projector_hidden_size == 88
    widths = {dv: PsaConfig(dv, 40, 16, num_attention_heads=5).projector_hidden_size for dv in (1024, 1152, 5120)}
    assert widths == {1024: 1088, 1152: 1088, 5120: 1088}
    config.to_json_file(tmp_path / "c.json")
    assert PsaConfig.from_json_file(tmp_path / "c.json") == config
    (tmp_path / "bad.json").write_text('{"hidden_size": 8, "colour": 1}')
    with pytest.raises(ValueError, match="colour"):
        PsaConfig.from_json_file(tmp_path / "bad.json")
    assert PsaConfig(24, 40, 16, num_attention_heads=5, compat="paper").query == "first"
    for wrong in ({"num_attention_heads": 7}, {"image_tokens": 15}, {"query": "last"}, {"compat": "theirs"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            PsaConfig(
                **{"vision_hidden_size": 24, "hidden_size": 40, "image_tokens": 16, "num_attention_heads": 5, **wrong}
            )
