"""Several queries at once, rows without an image, and the worst window: against nn.MultiheadAttention in fp64."""

import json

import pytest
import torch
import torch.nn.functional as F
from builders.tiny_vlm import IMAGE_ID, SMALL, make_batch, make_vlm

from psa_fast.models import PsaConfig, PsaVLM
from psa_fast.models.queries import spaced_windows, unsafe_log_odds, window_starts
from psa_fast.taxonomy import CLEAN


def build(**kwargs):
    vlm = make_vlm(dtype=torch.float64)
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=3, **{**SMALL, "query_window": 2, **kwargs}).eval()
    with torch.no_grad():  # large enough for the windows to differ
        psa.bottleneck.heads.weight.mul_(8)
    return psa


def labelled(counts=(1, 2, 0)):
    batch = make_batch(3, counts, dtype=torch.float64)
    batch["picture_type"] = torch.tensor([4, -100, 5])[: len(counts)]
    batch["picture_level"] = torch.tensor([2, 1, 0])[: len(counts)]
    batch["words_type"] = torch.tensor([CLEAN, 2, 5])[: len(counts)]
    batch["words_level"] = torch.tensor([0, -100, 1])[: len(counts)]
    return batch


def reference(psa, embeds, mask, vision):
    """Logits [11] of one query: mask bool [T] over the embeddings [T, E], vision [S1, Dv] or None."""
    b = psa.bottleneck
    query = b.query.weight[0]
    if mask.any():
        mean = embeds[mask].mean(0)
        query = query + mean / (mean.square().mean() + 1e-8).sqrt()
    keys = b.head_tokens.weight
    if vision is not None:
        seen = b.projector(vision.view(-1, psa.config.image_tokens, vision.shape[-1])).flatten(0, 1)
    else:
        seen = b.text_tokens.weight if b.text_tokens is not None else keys[:0]
    a = F.silu(seen + b.attention.feature_bias)
    keys = torch.cat([keys, a @ b.attention.readout_weight.T + b.attention.readout_bias])
    oracle = torch.nn.MultiheadAttention(b.attention.embed_dim, b.attention.num_heads, batch_first=True).double()
    own = {k: v for k, v in b.attention.named_parameters() if k in oracle.state_dict()}
    inputs = query[None, None], keys[None], keys[None]
    pooled = torch.func.functional_call(oracle, own, inputs, {"need_weights": False}, strict=True)[0][0, 0]
    return b.heads.weight @ pooled + b.heads.bias


def all_references(psa, batch, masks):
    features = psa.encode_images(batch["pixel_values"]).vision if batch["pixel_values"] is not None else None
    embeds = psa.vlm.get_input_embeddings()(batch["input_ids"])
    rows, first = [], 0
    for row, count in enumerate(batch["image_counts"].tolist()):
        vision = features[first : first + count].flatten(0, 1) if count else None
        rows.append(torch.stack([reference(psa, embeds[row], mask, vision) for mask in masks[row]]))
        first += count
    return torch.stack(rows)


def test_every_query_is_a_multihead_attention_of_its_own():
    psa, batch = build(), labelled()
    whole = batch["query_mask"]
    masks = torch.cat([whole[:, None], torch.zeros_like(whole)[:, None], spaced_windows(whole, 2)], 1)
    features = psa.encode_images(batch["pixel_values"])
    vision = features.vision.detach().requires_grad_()
    got = psa.concept_logits(features._replace(vision=vision), [1, 2, 0], batch["input_ids"], masks)
    expected = all_references(psa, batch, masks)
    assert got.shape == (3, 14, 11)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    # one query at a time is the same, and no row depends on another's images
    one = psa.concept_logits(features, [1, 2, 0], batch["input_ids"], whole)
    torch.testing.assert_close(one, got[:, 0], rtol=1e-9, atol=1e-9)
    alone = psa.concept_logits(None, [0], batch["input_ids"][2:], masks[2:])
    torch.testing.assert_close(alone, got[2:], rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(got[1, 1, 3], vision)
    assert (gradient[0] == 0).all()
    assert (gradient[1:].flatten(1).abs().amax(1) > 0).all()


def worst_of(logits):
    """The place of the riskiest of [W, 11], by the larger of both heads' odds."""
    p = logits[:, :7].softmax(-1)[:, CLEAN]
    q = logits[:, 7:].softmax(-1)[:, 0]
    return int(torch.maximum((1 - p) / p, (1 - q) / q).argmax())


def expected_loss(psa, batch):
    """The stacked mean, and which windows were taken."""
    whole = batch["query_mask"]
    windows = spaced_windows(whole, psa.config.query_window)
    masks = torch.cat([whole[:, None], torch.zeros_like(whole)[:, None], windows], 1)
    seen = all_references(psa, batch, masks)
    bare = batch | {"image_counts": torch.zeros_like(batch["image_counts"]), "pixel_values": None}
    alone = all_references(psa, bare, masks)
    apart = psa.config.num_text_tokens > 0
    chosen, losses = [], []
    for part, head in ((slice(0, 7), "type"), (slice(7, 11), "level")):
        terms = []

        def add(logits, label, part=part, terms=terms):
            if label != -100:
                terms.append(F.cross_entropy(logits[part], label))

        for row, count in enumerate(batch["image_counts"].tolist()):
            risky = batch["words_type"][row] not in (-100, CLEAN)
            asked = []
            if not apart or (count and not risky):
                asked.append((seen[row], batch[f"safe_{head}"][row]))
            if apart:
                asked.append((alone[row], batch[f"words_{head}"][row]))
            for logits, label in asked:
                chosen.append(worst_of(logits[2:]))
                add(logits[0], label)
                add(logits[2 + chosen[-1]], label)
            if count:
                add(seen[row, 1], batch[f"picture_{head}"][row])
        losses.append(torch.stack(terms).mean())
    return losses, chosen


@pytest.mark.parametrize("texts", [6, 0])
def test_the_loss_is_the_mean_over_prompt_worst_window_picture_and_words(texts):
    psa, batch = build(num_text_tokens=texts), labelled()
    del batch["labels"]
    (kind, level), chosen = expected_loss(psa, batch)
    assert len(set(chosen)) > 1  # not always the first
    out = psa(**batch)
    torch.testing.assert_close(out.loss_type, kind, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss_level, level, rtol=1e-9, atol=1e-9)
    names = [n for n, p in psa.bottleneck.named_parameters()]
    parameters = [p for _, p in psa.bottleneck.named_parameters()]
    got = torch.autograd.grad(out.loss, parameters)
    wanted = torch.autograd.grad(kind + level, parameters)
    for name, g, w in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_rows_and_single_rows_sum_to_the_padded_batch():
    from psa_fast.training.flops import Load

    psa, batch = build(), labelled()
    out = psa(**batch)
    real = batch["attention_mask"].bool()
    packed = {k: batch[k][real].unsqueeze(0) for k in ("input_ids", "labels", "query_mask")}
    rest = {k: v for k, v in batch.items() if k not in packed and k != "attention_mask"}
    got = psa(**packed, **rest, lengths=real.sum(1).tolist())
    for name in ("loss", "loss_type", "loss_level", "concept_logits"):
        torch.testing.assert_close(getattr(got, name), getattr(out, name), rtol=1e-9, atol=1e-9)
    # row by row with the global counts as divisors, as ranks and accumulation steps do
    load = Load.of(batch, psa.config)
    assert (load.typed, load.levelled) == (2 + 1 + 6, 2 + 2 + 4)
    divisors = torch.tensor([load.typed, load.levelled], dtype=torch.float64)
    total, first = 0.0, 0
    for row, count in enumerate(batch["image_counts"].tolist()):
        single = {k: v[row : row + 1] for k, v in batch.items() if k not in ("pixel_values", "labels")}
        single["pixel_values"] = batch["pixel_values"][first : first + count] if count else None
        total = total + psa(**single, num_concept_rows=divisors).loss
        first += count
    torch.testing.assert_close(total, out.loss_type + out.loss_level, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("counts", [(1, 2, 0), (0, 0), (1, 1)])
def test_every_rank_runs_the_same_modules(counts):
    psa = build()
    psa.vlm.requires_grad_(False)
    order = []
    for name, module in psa.named_modules():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    psa(**labelled()).loss.backward()
    expected, order[:] = list(order), []
    psa.zero_grad()
    psa(**labelled(counts)).loss.backward()
    assert order == expected
    assert all((p.grad is not None) == p.requires_grad for p in psa.parameters())


def test_windows_cover_the_text_and_both_ends():
    assert window_starts(8, 8) == window_starts(100, 0) == []
    assert window_starts(9, 8) == [0, 1]
    assert window_starts(20, 8) == [0, 4, 8, 12]
    assert window_starts(21, 8) == [0, 4, 8, 12, 13]
    assert window_starts(3, 1) == [0, 1, 2]
    for n in range(9, 60):  # any sentence of up to half a window lies whole in one
        spans = [(s, s + 8) for s in window_starts(n, 8)]
        assert all(any(a <= i and i + 5 <= b for a, b in spans) for i in range(n - 4))
    text = torch.zeros(2, 50, dtype=torch.bool)
    text[0, 3:43] = True
    text[0, 10:12] = False  # an image between the words
    text[1, :4] = True
    found = spaced_windows(text, 6)
    assert found.sum(2)[0].tolist() == [6] * 12
    places = text[0].nonzero().flatten().tolist()
    assert found[0, 0].nonzero().flatten().tolist() == places[:6]
    assert found[0, -1].nonzero().flatten().tolist() == places[-6:]
    assert (found[1] == text[1]).all()


def test_log_odds_are_those_of_the_worse_head():
    logits = torch.randn(5, 3, 11, dtype=torch.float64)
    risky = torch.maximum(1 - logits[..., :7].softmax(-1)[..., CLEAN], 1 - logits[..., 7:].softmax(-1)[..., 0])
    torch.testing.assert_close(unsafe_log_odds(logits, (7, 4)).sigmoid(), risky)


def test_which_readings_an_addon_was_trained_on(tmp_path):
    fields = dict(vision_hidden_size=24, hidden_size=40, image_tokens=16)
    new = PsaConfig(**fields)
    assert (new.neutral_query, new.query_window, new.reads_text, new.num_text_tokens) == (True, 16, True, 64)
    assert PsaConfig(**fields, num_head_tokens=8).num_text_tokens == 8
    for config in (PsaConfig(**fields, query="first"), PsaConfig(**fields, compat="paper")):
        assert (config.neutral_query, config.query_window, config.reads_text) == (False, 0, False)
    assert PsaConfig(**fields, num_head_tokens=0).reads_text is False
    with pytest.raises(ValueError, match="query_window is 8, but query 'first' reads no text"):
        PsaConfig(**fields, query="first", query_window=8)
    with pytest.raises(ValueError, match="reads_text is True, but num_head_tokens is 0"):
        PsaConfig(**fields, num_head_tokens=0, reads_text=True)
    with pytest.raises(ValueError, match="neutral_query is 1; expected true or false"):
        PsaConfig(**fields, neutral_query=1)
    with pytest.raises(ValueError, match="num_text_tokens is 4, but reads_text is False"):
        PsaConfig(**fields, reads_text=False, num_text_tokens=4)


def test_what_files_of_earlier_versions_mean(tmp_path):
    fields = dict(vision_hidden_size=24, hidden_size=40, image_tokens=16)
    new = PsaConfig(**fields)
    file = tmp_path / "psa_config.json"
    new.to_json_file(file)
    assert PsaConfig.from_json_file(file) == new
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"version": 3}))
    with pytest.raises(ValueError, match="unknown keys: 'num_text_tokens'"):
        PsaConfig.from_json_file(file)
    del raw["num_text_tokens"]
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="lacks: num_text_tokens"):
        PsaConfig.from_json_file(file)
    raw["version"] = 3
    file.write_text(json.dumps(raw))
    config = PsaConfig.from_json_file(file)
    assert (config.reads_text, config.num_text_tokens) == (True, 0)
    # the digest that such a program wrote beside the weights
    assert config.digest() == "9225ac8f0991f5e6412499e77131c2a6115c122af4a7a6873c7560a18e86bea9"
    old = {k: v for k, v in raw.items() if k not in ("neutral_query", "query_window", "reads_text")}
    file.write_text(json.dumps(old | {"version": 3}))
    with pytest.raises(ValueError, match="lacks: neutral_query, query_window, reads_text"):
        PsaConfig.from_json_file(file)
    file.write_text(json.dumps(old | {"version": 2}))
    config = PsaConfig.from_json_file(file)
    assert (config.neutral_query, config.query_window, config.reads_text) == (False, 0, False)
    # the digest that an earlier program wrote beside the weights
    assert config.digest() == "a9a71d1b9a18cd1a1dd388ffb885d445d9c9558a7489bbffb7e0cdead37a2afa"
    file.write_text(json.dumps(raw | {"version": 2}))
    with pytest.raises(ValueError, match="unknown keys: 'neutral_query"):
        PsaConfig.from_json_file(file)


def test_an_old_addon_trains_as_before():
    psa = build(neutral_query=False, query_window=0, reads_text=False)
    batch = labelled()
    del batch["labels"]
    logits = all_references(psa, batch, batch["query_mask"][:, None])[:2, 0]
    out = psa(**batch)
    assert out.concept_rows.tolist() == [0, 1]
    torch.testing.assert_close(out.loss_type, F.cross_entropy(logits[:, :7], batch["safe_type"][:2]))
    torch.testing.assert_close(out.loss_level, F.cross_entropy(logits[:, 7:], batch["safe_level"][:2]))
    with pytest.raises(ValueError, match="nothing to read"):
        build(num_head_tokens=0).concept_logits(None, [0], torch.full((1, 3), IMAGE_ID))
