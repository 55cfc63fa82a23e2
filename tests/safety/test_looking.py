"""Where a reading looked, against torch's own attention on what the guard's pool was given."""

from dataclasses import replace

import pytest
import torch
from builders.tiny_llava import build_addon, picture
from torch import nn
from torch.nn import functional as F

from psa_fast.safety import Request, Verdict, load_guard
from psa_fast.safety.looking import looked_at


@pytest.fixture(scope="module")
def guard(folders, tmp_path_factory):
    return load_guard(build_addon(folders[0], tmp_path_factory.mktemp("looking") / "addon"))


def oracle(attention, query, tokens, features):
    """Attention of torch's module, [S0 + S1], of one query [E] on features [S1, E]."""
    theirs = nn.MultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True)
    own = ("feature", "readout")
    theirs.load_state_dict({k: v for k, v in attention.state_dict().items() if not k.startswith(own)})
    read = F.linear(F.silu(features + attention.feature_bias), attention.readout_weight, attention.readout_bias)
    keys = torch.cat([tokens, read]).unsqueeze(0)
    return theirs(query.view(1, 1, -1), keys, keys)[1][0, 0]


@torch.no_grad()
def test_every_reading_looked_where_its_attention_was(guard, monkeypatch):
    request = Request("what colour is the circle ? " * 4, (picture(0), picture(1)))
    attention, given = guard.model.bottleneck.attention, []
    real = attention.forward

    def forward(query, tokens, features, features_mask=None):
        given.append((query, tokens, features, features_mask))
        return real(query, tokens, features, features_mask)

    monkeypatch.setattr(attention, "forward", forward)
    (readings,) = guard.readings([request])
    shown = [reading for reading in readings if not reading.words_alone]
    query, tokens, features, mask = given[0]
    count = features.shape[1] // 2
    assert len(shown) == 3 * query.shape[1], "all pictures and each alone, by every query"
    for number, reading in enumerate(shown):
        row, column = divmod(number, query.shape[1])
        seen = features[row] if mask is None else features[row][mask[row]]
        expected = oracle(attention, query[row, column], tokens, seen)[tokens.shape[0] :]
        places = (0, 1) if reading.picture is None else (reading.picture,)
        verdict = Verdict(True, True, True, "hint", "", query=reading.query, query_number=reading.number,
                          picture=reading.picture, words_alone=False, code="unsafe")  # fmt: skip
        looked = looked_at(guard, request, verdict)
        assert [one is not None for one in looked] == [place in places for place in (0, 1)]
        for place, part in zip(places, expected.split(count), strict=True):
            assert looked[place] == pytest.approx(part.tolist(), abs=1e-5)
        assert 0.0 < sum(sum(one) for one in looked if one is not None) < 1.0
    (verdict,) = guard.verdicts([request])
    alone = replace(verdict, query="prompt", query_number=None, picture=None, words_alone=True)
    assert looked_at(guard, request, alone) == [None, None]
    with pytest.raises(ValueError, match="none of the request's"):
        looked_at(guard, request, replace(alone, query="window", query_number=99))
