"""PsaVLM against Hugging Face's own LLaVA: losses, generation, padding, rows without an image."""

import pytest
import torch
from builders.tiny_vlm import IMAGE_ID, SMALL, make_batch, make_vlm

from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.models import ImageFeatures, PsaVLM
from psa_fast.training.recompute import recompute


def build(vlm=None, tokens=3, **kwargs):
    vlm = make_vlm(**kwargs.pop("vlm_kwargs", {})) if vlm is None else vlm
    torch.manual_seed(1)
    return PsaVLM.build(vlm, num_safety_tokens=tokens, **{**SMALL, **kwargs}).eval()


def hf_inputs(batch):
    return {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "labels")}


@pytest.mark.parametrize("kwargs", [{}, {"tied": True}, {"tower": "siglip", "strategy": "full"}, {"layer": [-2, 1]}])
def test_without_safety_tokens_the_loss_is_hf_llavas_own(kwargs):
    vlm = make_vlm(dtype=torch.float64, **kwargs)
    batch = make_batch(0, dtype=torch.float64)
    vlm.requires_grad_(True)
    expected = vlm(**hf_inputs(batch)).loss
    wanted = [p for p in vlm.parameters() if p.requires_grad]
    reference = torch.autograd.grad(expected, wanted, allow_unused=True)
    psa = build(vlm, tokens=0)
    assert psa.bottleneck.heads.weight.dtype == torch.float64
    out = psa(**batch)
    # transformers takes its loss in fp32, whatever the model's dtype
    torch.testing.assert_close(out.loss_lm, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    got = torch.autograd.grad(out.loss_lm, wanted, allow_unused=True)
    for g, r, p in zip(got, reference, wanted, strict=True):
        g, r = (torch.zeros_like(p) if x is None else x for x in (g, r))
        torch.testing.assert_close(g, r, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(vlm(**hf_inputs(batch)).loss, expected)  # the stock model is whole afterwards


def test_with_safety_tokens_the_loss_is_hfs_from_embeddings(batch):
    psa = build()
    vlm = psa.vlm
    embeds = vlm.get_input_embeddings()(batch["input_ids"]).detach()
    projected = torch.stack(vlm.model.get_image_features(batch["pixel_values"]).pooler_output)
    visual = torch.cat([psa.safety_tokens.weight.expand(3, -1, -1), projected], 1).flatten(0, 1)
    embeds[batch["input_ids"] == IMAGE_ID] = visual
    expected = vlm(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    out = psa(**batch)
    torch.testing.assert_close(out.loss_lm, expected, rtol=1e-5, atol=1e-5)
    # sums over a share of the items, as on a rank: half of twice as many
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(psa(**batch, num_items=2 * count).loss_lm, expected / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        psa(**batch, concept_loss_weight=10.0, lm_loss_weight=0.5).loss,
        0.5 * expected + 10 * (out.loss_type + out.loss_level),
        rtol=1e-5,
        atol=1e-5,
    )
    assert out.concept_rows.tolist() == [0, 1, 2]
    assert out.concept_logits.shape == (3, 11)


def test_one_vision_pass_up_to_the_used_layer_and_only_supervised_rows_at_the_head(batch, monkeypatch):
    psa = build()
    psa.vlm.requires_grad_(False)
    calls = {"tower": 0, "layers": [0, 0, 0]}
    tower = psa.vlm.model.vision_tower
    tower.register_forward_hook(lambda *_: calls.__setitem__("tower", calls["tower"] + 1))
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: calls["layers"].__setitem__(i, calls["layers"][i] + 1))
    rows = []
    real = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda s, d, i: rows.append((s.dim(), i.shape[0])) or real(s, d, i)
    )
    out = psa(**batch)
    assert calls == {"tower": 1, "layers": [1, 1, 0]}
    supervised = (batch["labels"][:, 1:] != -100).sum().item()
    assert rows[0] == (2, supervised)
    out.loss.backward()
    got = {n for n, p in psa.named_parameters() if p.grad is not None}
    assert got == {n for n, _ in psa.named_parameters() if not n.startswith("vlm.")}
    features = psa.encode_images(batch["pixel_values"])
    psa.generate(batch["input_ids"][1:2], None, ImageFeatures(*(f[1:] for f in features)), [2], max_new_tokens=3)
    assert calls["tower"] == 2


def test_concept_branch_ignores_padding_side_neighbours_and_answers(batch):
    psa = build(vlm_kwargs={"dtype": torch.float64})
    batch["pixel_values"] = batch["pixel_values"].double()
    out = psa(**batch)
    width = batch["input_ids"].shape[1]
    left = dict(batch)
    for name in ("input_ids", "attention_mask", "labels", "query_mask"):
        left[name] = torch.stack(
            [
                torch.roll(row, width - int(n), 0)
                for row, n in zip(batch[name], batch["attention_mask"].sum(1), strict=True)
            ]
        )
    moved = psa(**left)
    torch.testing.assert_close(moved.concept_logits, out.concept_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.loss, out.loss, rtol=1e-9, atol=1e-9)
    # each row by itself
    total = sum_items = 0
    for row, images in ((0, slice(0, 1)), (1, slice(1, 3)), (2, None)):
        n = int(batch["attention_mask"][row].sum())
        single = {k: v[row : row + 1] for k, v in batch.items() if k != "pixel_values"}
        for name in ("input_ids", "attention_mask", "labels", "query_mask"):
            single[name] = single[name][:, :n]
        single["pixel_values"] = None if images is None else batch["pixel_values"][images]
        alone = psa(**single, num_items=1.0)
        items = (single["labels"] != -100).sum()
        total, sum_items = total + alone.loss_lm, sum_items + items
        torch.testing.assert_close(alone.concept_logits, out.concept_logits[row : row + 1], rtol=1e-9, atol=1e-9)
        assert alone.loss_type.item() > 0
    torch.testing.assert_close(total / sum_items, out.loss_lm, rtol=1e-9, atol=1e-9)
    # an answer never reaches the head; the default mask equals the given one
    other = dict(batch, input_ids=batch["input_ids"].clone())
    answer = batch["labels"] != -100
    other["input_ids"][answer] = 5
    torch.testing.assert_close(psa(**other).concept_logits, out.concept_logits, rtol=0, atol=0)
    derived = psa(**{k: v for k, v in batch.items() if k != "query_mask"})
    torch.testing.assert_close(derived.concept_logits, out.concept_logits, rtol=0, atol=0)
    # the prompt does
    prompt = dict(batch, input_ids=batch["input_ids"].clone())
    prompt["input_ids"][batch["query_mask"]] = 7
    assert (psa(**prompt).concept_logits - out.concept_logits).abs().max() > 1e-6


def test_query_first_is_blind_to_the_text(batch):
    psa = build(query="first")
    assert psa.bottleneck.query is None
    out = psa(**batch)
    prompt = dict(batch, input_ids=batch["input_ids"].clone())
    prompt["input_ids"][:, 1:][batch["query_mask"][:, 1:]] = 7
    torch.testing.assert_close(psa(**prompt).concept_logits, out.concept_logits, rtol=0, atol=0)
    # the first token, not the padding in front of it
    n = int(batch["attention_mask"][0].sum())
    left = {k: torch.roll(batch[k][:1], -n, 1) for k in ("input_ids", "query_mask")}
    features = psa.encode_images(batch["pixel_values"][:1])
    logits = psa.concept_logits(features, [1], left["input_ids"], left["query_mask"])
    torch.testing.assert_close(logits, out.concept_logits[:1], rtol=1e-5, atol=1e-6)


def test_concept_logits_from_features_equal_the_forward(batch):
    psa = build()
    features = psa.encode_images(batch["pixel_values"])
    logits = psa.concept_logits(features, batch["image_counts"], batch["input_ids"], batch["query_mask"])
    torch.testing.assert_close(logits, psa(**batch).concept_logits)
    assert logits.shape == (3, 11)
    text_only = psa.concept_logits(None, [0], batch["input_ids"][2:], batch["query_mask"][2:])
    torch.testing.assert_close(text_only, logits[2:])


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (2, 0)])
def test_every_batch_runs_the_same_modules_and_reaches_the_same_parameters(counts):
    """What ZeRO-3 ranks need: the calls and the gradients of a batch do not depend on its images or labels."""
    psa = build()
    psa.vlm.requires_grad_(False)
    order = []
    for name, module in psa.named_modules():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    batch = make_batch(3, counts)
    if counts == (0, 0):
        unlabelled = ("labels", *(name for name in CONCEPT_LABELS if name in batch))
        batch |= {name: torch.full_like(batch[name], -100) for name in unlabelled}
    psa(**make_batch(3)).loss.backward()
    reference, order[:] = list(order), []
    psa.zero_grad()
    loss = psa(**batch).loss
    assert torch.isfinite(loss)
    loss.backward()
    assert order == reference
    assert all((p.grad is not None) == p.requires_grad for p in psa.parameters())
    if not any(counts):
        assert loss.item() == 0
        assert all((p.grad == 0).all() for p in psa.parameters() if p.requires_grad)


def test_losses_that_are_not_asked_for_are_not_computed(batch):
    psa = build()
    ran = []
    psa.vlm.model.language_model.register_forward_hook(lambda *_: ran.append("llm"))
    psa.bottleneck.register_forward_hook(lambda *_: ran.append("bottleneck"))
    concept = psa(**{k: v for k, v in batch.items() if k != "labels"})
    assert ran == ["bottleneck"]
    assert concept.loss_lm is None
    torch.testing.assert_close(concept.loss, concept.loss_type + concept.loss_level)
    ran.clear()
    lm = psa(**{k: v for k, v in batch.items() if k not in CONCEPT_LABELS})
    assert ran == ["llm"]
    assert lm.loss_type is None
    torch.testing.assert_close(lm.loss, lm.loss_lm)


@pytest.mark.parametrize("tied", [False, True])
def test_generate_equals_hf_for_zero_tokens(tied):
    vlm = make_vlm(tied=tied)
    ids = make_batch(0, (1, 2))
    ids.pop("labels")
    width = ids["input_ids"].shape[1]
    shift = [width - int(n) for n in ids["attention_mask"].sum(1)]
    input_ids, mask = (
        torch.stack([torch.roll(r, s, 0) for r, s in zip(ids[k], shift, strict=True)])
        for k in ("input_ids", "attention_mask")
    )
    expected = vlm.generate(
        input_ids=input_ids, attention_mask=mask, pixel_values=ids["pixel_values"], max_new_tokens=8, do_sample=False
    )[:, width:]
    psa = build(vlm, tokens=0)
    got = psa.generate(input_ids, mask, psa.encode_images(ids["pixel_values"]), ids["image_counts"], max_new_tokens=8)
    assert got.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="left padding"):
        psa.generate(ids["input_ids"], ids["attention_mask"], psa.encode_images(ids["pixel_values"]))


def test_generate_batch_equals_single_with_tokens_and_text_rows():
    psa = build(vlm_kwargs={"dtype": torch.float64})
    with torch.no_grad():
        psa.safety_tokens.weight.normal_()
    batch = make_batch(3, dtype=torch.float64)
    features = psa.encode_images(batch["pixel_values"])
    width = batch["input_ids"].shape[1]
    lengths = batch["attention_mask"].sum(1).tolist()
    left = {
        k: torch.stack([torch.roll(r, width - n, 0) for r, n in zip(batch[k], lengths, strict=True)])
        for k in ("input_ids", "attention_mask")
    }
    together = psa.generate(**left, features=features, image_counts=batch["image_counts"], max_new_tokens=6)
    for row, images in ((0, slice(0, 1)), (1, slice(1, 3)), (2, slice(3, 3))):
        alone = psa.generate(
            batch["input_ids"][row : row + 1, : lengths[row]],
            features=ImageFeatures(*(f[images] for f in features)),
            max_new_tokens=6,
        )
        assert alone[0].tolist() == together[row].tolist()


def test_wrong_image_counts_are_refused(batch):
    psa = build()
    with pytest.raises(ValueError, match="3 images, its rows ask for 2"):
        psa(**{**batch, "image_counts": torch.tensor([1, 1, 0])})
    with pytest.raises(ValueError, match="each image needs 19 placeholders"):
        psa(**{**batch, "image_counts": torch.tensor([2, 1, 0])})
    with pytest.raises(ValueError, match="rows ask for 3"):
        psa(**{**batch, "pixel_values": None})
    counted = psa(**{k: v for k, v in batch.items() if k != "image_counts"})
    assert counted.loss == psa(**batch).loss


def test_activation_checkpointing_and_training_mode_keep_the_gradients(batch):
    psa = build(vlm_kwargs={"dtype": torch.float64})
    batch["pixel_values"] = batch["pixel_values"].double()
    psa.vlm.requires_grad_(False)
    psa(**batch).loss.backward()
    reference = {n: p.grad.clone() for n, p in psa.named_parameters() if p.grad is not None}
    psa.zero_grad()
    psa.train()
    recompute(psa.vlm, 1)
    psa(**batch).loss.backward()
    for name, p in psa.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, reference[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", [(1, 2, 0), (0, 0, 0)])
def test_features_already_computed_stand_in_for_the_images(counts):
    psa = build()
    batch = make_batch(3, counts)
    del batch["labels"]
    expected = psa(**batch)
    pixels = batch.pop("pixel_values")
    shape = (psa.config.image_tokens, psa.config.vision_hidden_size)
    features = torch.empty(0, *shape) if pixels is None else psa.encode_images(pixels).vision

    def no_tower(*args, **kwargs):
        raise AssertionError("the vision tower ran")

    psa.vlm.model.vision_tower.forward = no_tower
    out = psa(**batch, vision_features=features)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.concept_logits, expected.concept_logits)
    with pytest.raises(ValueError, match="either pixel_values or vision_features"):
        psa(**batch, vision_features=features, pixel_values=torch.zeros(1, 3, 16, 16))
