"""An explanation says what the verdict rests on; what the features add up to is what the concept head said."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.tiny_llava import build_addon, picture
from torch import nn
from torch.nn import functional as F

from psa_fast.safety import Guard, Policy, Request, load_guard
from psa_fast.safety.explanation import MOST_LOOKS, deciding_reading, explain, explained
from psa_fast.safety.looking import looks
from psa_fast.safety.overlay import explanation_svg
from psa_fast.safety.redecide import redecide
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

ASKED = Request("<image>\n<image>\nwhat colour is the circle ?", (picture(0), picture(1)))


@pytest.fixture(scope="module")
def guard(folders, tmp_path_factory):
    return load_guard(build_addon(folders[0], tmp_path_factory.mktemp("explained") / "addon"))


@torch.no_grad()
def test_what_the_features_add_is_their_part_of_the_logits(guard, monkeypatch):
    bottleneck, given = guard.model.bottleneck, []
    attention, real = bottleneck.attention, bottleneck.attention.forward

    def forward(query, tokens, features, features_mask=None):
        given.append((query, tokens, features, features_mask))
        return real(query, tokens, features, features_mask)

    monkeypatch.setattr(attention, "forward", forward)
    (readings,) = guard.readings([ASKED])
    shown = [reading for reading in readings if not reading.words_alone]
    found = looks(guard, ASKED, shown)
    query, tokens, features, mask = given[0]
    assert len(found) == len(shown) == 3 * query.shape[1]
    theirs = nn.MultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True)
    own = ("feature", "readout")
    theirs.load_state_dict({k: v for k, v in attention.state_dict().items() if not k.startswith(own)})
    value = [part.chunk(3)[2] for part in (attention.in_proj_weight, attention.in_proj_bias)]
    for number, (look, reading) in enumerate(zip(found, shown, strict=True)):
        assert list(look.added) == [*RISK_TYPES, *RISK_LEVELS]
        places = [place for place, one in enumerate(look.attention) if one is not None]
        assert places == ([0, 1] if reading.picture is None else [reading.picture])
        added = torch.tensor([[look.added[name][place] for place in places] for name in look.added]).flatten(1)
        row, column = divmod(number, query.shape[1])
        seen = features[row] if mask is None else features[row][mask[row]]
        # torch's own attention, and the output of every feature's value by itself
        keys = torch.cat([tokens, attention.read(seen)]).unsqueeze(0)
        weights = theirs(query[row, column].view(1, 1, -1), keys, keys, average_attn_weights=False)[1][0, :, 0]
        values = F.linear(keys[0], *value)[tokens.shape[0] :].unflatten(1, (attention.num_heads, -1))
        pooled = (weights[:, tokens.shape[0] :].t().unsqueeze(2) * values).flatten(1)
        logits = F.linear(F.linear(pooled, attention.out_proj.weight), bottleneck.heads.weight).t()
        expected = torch.cat([logits[:7] - logits[:7].mean(0), logits[7:] - logits[7:].mean(0)])
        assert torch.allclose(added, expected, atol=1e-5)


def test_an_explanation_names_rule_threshold_margin_and_flips(guard):
    (verdict,) = guard.verdicts([ASKED])
    found = explain(guard, ASKED)
    assert found.verdict == verdict
    assert found.verdict.unsafe
    assert (found.key, found.threshold, found.threshold_key) == (f"levels.{verdict.level}", 0.5, "unsafe_threshold")
    assert found.margin == pytest.approx(verdict.unsafe_score - 0.5)
    assert verdict.rule.endswith(f"unsafe by {' and '.join(found.heads)}")
    assert len(found.flips) == 12
    first = found.looks[0]
    assert 1 < len(found.looks) <= MOST_LOOKS
    if not verdict.words_alone:
        assert (first.query, first.number, first.picture) == (verdict.query, verdict.query_number, verdict.picture)
    text = json.dumps(found.to_json())
    assert json.loads(text)["looks"][0]["attention"]
    assert "looks" not in found.to_json(cells=False)
    words = "\n".join(found.lines())
    assert f"levels.{verdict.level}" in words
    assert "unsafe_threshold" in words
    assert "nearest first" in words


def test_what_a_flip_says_happens(guard):
    """The verdict of readings whose logits were changed by hand is the one that the flip names."""
    found = explain(guard, ASKED)
    flip = found.flips[-1]
    assert (flip.head, flip.action) == ("both", "allow")
    for factor, expected in ((1.0, flip.action), (0.999, found.verdict.action)):
        changed = []
        for reading in found.verdict.readings:
            logits = list(reading.logits)
            for place in (6, 7):
                logits[place] += factor * flip.logit_change
            changed.append(replace(reading, logits=logits))
        assert redecide(guard.policy, replace(found.verdict, readings=tuple(changed))).action == expected


def test_a_verdict_is_explained_without_a_model_and_only_by_its_policy(guard):
    (verdict,) = guard.verdicts([ASKED])
    found = explained(guard.policy, verdict)
    assert replace(explain(guard, ASKED), looks=(), seen=()) == found
    other = Policy.model_validate(guard.policy.model_dump() | {"unsafe_threshold": 0.9})
    with pytest.raises(ValueError, match="is of policy"):
        explained(other, verdict)
    with pytest.raises(ValueError, match="were not kept"):
        explained(guard.policy, replace(verdict, readings=()))
    with pytest.raises(ValueError, match="were not kept"):
        deciding_reading(replace(verdict, readings=()))


def test_types_off_and_what_is_not_read_name_their_key(guard):
    values = guard.policy.model_dump() | {"types": dict.fromkeys(guard.policy.types, False)}
    off = explain(Guard(guard.model, guard.processor, Policy.model_validate(values)), ASKED)
    assert off.verdict.code == "type_off"
    assert off.key == f"types.{off.verdict.type}"
    unreadable = explain(guard, Request("<image>\nwhat ?", (b"none",)))
    assert (unreadable.key, unreadable.margin, unreadable.flips) == ("responses.unchecked", None, ())
    assert "not_checked" in "\n".join(unreadable.lines())
    assert ET.fromstring(explanation_svg(unreadable)) is not None


def test_a_head_that_gives_no_number_is_explained_too(guard):
    (verdict,) = guard.verdicts([ASKED])
    broken = tuple(replace(reading, logits=[float("nan")] * 11) for reading in verdict.readings)
    found = explain(guard, ASKED, redecide(guard.policy, replace(verdict, readings=broken)))
    assert (found.verdict.code, found.key, found.flips, found.looks) == ("not_finite", "responses.unchecked", (), ())
    assert "NaN" not in json.dumps(found.to_json())
    assert ET.fromstring(explanation_svg(found)) is not None


def test_the_picture_is_whole_and_loads_nothing(guard):
    found = explain(guard, ASKED)
    assert [image.size for image in found.seen] == [(12, 12), (12, 12)]
    for image, given in zip(found.seen, ASKED.images, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(given).astype(int)).max() <= 1
    svg = explanation_svg(found)
    root = ET.fromstring(svg)
    hrefs = [one.get("href") for one in root.iter("{http://www.w3.org/2000/svg}image")]
    assert all(href.startswith("data:image/jpeg;base64,") for href in hrefs)
    assert "://" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    shown = sum(shares is not None for look in found.looks for shares in look.attention)
    assert len(hrefs) == shown * (2 + len(RISK_TYPES) + 1)
