"""A packed row against the same samples padded: losses, logits and gradients, under every attention."""

import pytest
import torch
from builders.tiny_vlm import SMALL, make_batch, make_vlm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.models import PsaVLM, add_lora
from psa_fast.models.packing import SDPA_BY_SAMPLE, Packing

COUNTS = (1, 0, 2, 1, 0)  # images of each sample, text-only ones in the middle and at the end


def build(attention, query="prompt", tokens=3):
    vlm = make_vlm()
    vlm.set_attn_implementation({"text_config": attention})
    vlm.requires_grad_(False)
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=tokens, query=query, **SMALL)
    torch.manual_seed(2)
    add_lora(psa, r=4, alpha=8, dropout=0.0)
    for name, p in psa.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return psa


def padded_batch(counts=COUNTS):
    batch = make_batch(3, counts)
    batch["safe_type"] = torch.tensor([1, 6, 2, -100, 3])[: len(counts)]
    batch["safe_level"] = torch.tensor([3, 0, 1, 2, -100])[: len(counts)]
    batch["words_type"] = torch.tensor([-100, 6, 6, 2, 3])[: len(counts)]
    batch["words_level"] = torch.tensor([-100, 0, 0, 1, -100])[: len(counts)]
    return batch


def packed_batch(batch):
    """The batch's real tokens end to end, by another route than the collator's."""
    real = batch["attention_mask"].bool()
    row = {name: batch[name][real].unsqueeze(0) for name in ("input_ids", "labels", "query_mask")}
    rest = {name: batch[name] for name in ("pixel_values", "image_counts", *CONCEPT_LABELS) if name in batch}
    return {**row, **rest, "lengths": real.sum(1).tolist()}


def run(psa, batch):
    """Losses, concept logits, supervised rows of the language model's logits, gradients."""
    seen = {}

    def keep(head, args, kwargs):
        seen["rows"] = args[0][kwargs["labels"] != -100] @ head.weight.t()

    handle = psa.vlm.lm_head.register_forward_pre_hook(keep, with_kwargs=True)
    psa.zero_grad()
    out = psa(**batch)
    out.loss.backward()
    handle.remove()
    gradients = {n: p.grad.clone() for n, p in psa.named_parameters() if p.requires_grad}
    return out, seen["rows"].detach(), gradients


def cumulative(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, scaling=None, **kwargs):
    """Attention by FlashAttention's int32 cumulative lengths; query, key, value [1, H, T, D] -> [1, T, H, D]."""
    assert attention_mask is None
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    longest = cu_seq_lens_q.diff().max().item()
    assert (kwargs["max_length_q"], kwargs["max_length_k"]) == (longest, longest)
    bounds = zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_k[1:].tolist(), strict=True)
    outputs = []
    for start, end in bounds:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) * scaling
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("cumulative", cumulative)
AttentionMaskInterface.register("cumulative", flash_attention_mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager", SDPA_BY_SAMPLE, "cumulative"])
@pytest.mark.parametrize("query", ["prompt", "first"])
def test_packed_equals_padded(attention, query):
    batch = padded_batch()
    expected, rows, gradients = run(build("sdpa", query), batch)
    got, packed_rows, packed_gradients = run(build(attention, query), packed_batch(batch))
    for name in ("loss", "loss_lm", "loss_type", "loss_level"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)
    assert got.concept_rows.tolist() == expected.concept_rows.tolist()
    assert expected.concept_rows.tolist() == ([0, 2, 3] if query == "first" else [0, 1, 2, 3, 4])
    torch.testing.assert_close(got.concept_logits, expected.concept_logits, rtol=1e-5, atol=1e-5)
    assert len(rows) == (batch["labels"] != -100).sum()
    torch.testing.assert_close(packed_rows, rows, rtol=1e-5, atol=1e-5)
    assert any("lora_A" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            packed_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", ["sdpa", SDPA_BY_SAMPLE])
def test_samples_do_not_see_each_other(attention):
    psa = build(attention).eval()
    batch = padded_batch()
    packed = packed_batch(batch)
    reference = run(psa, packed)[1]
    start, end = sum(packed["lengths"][:2]), sum(packed["lengths"][:3])
    other = dict(packed, input_ids=packed["input_ids"].clone())
    text = torch.zeros_like(other["input_ids"], dtype=torch.bool)
    text[:, start:end] = True
    other["input_ids"][text & packed["query_mask"]] = 7
    changed = (run(psa, other)[1] - reference).abs().amax(1) > 1e-4
    supervised = (packed["labels"] != -100)[0]
    assert changed.tolist() == [start <= p < end for p in supervised.nonzero().flatten().tolist()]


@pytest.mark.parametrize("counts", [(0, 0), (0,), (2, 1)])
def test_packed_batches_without_images_or_of_one_sample(counts):
    psa = build(SDPA_BY_SAMPLE)
    batch = padded_batch(counts)
    (expected, _, gradients), (got, _, packed_gradients) = (run(psa, b) for b in (batch, packed_batch(batch)))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5)


def test_a_label_on_a_first_token_is_not_asked_of_the_sample_before():
    psa = build(SDPA_BY_SAMPLE)
    batch = padded_batch((0, 0))
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    torch.testing.assert_close(psa(**packed_batch(batch)).loss_lm, psa(**batch).loss_lm, rtol=1e-6, atol=1e-6)


def test_layout_and_refusals():
    packing = Packing([2, 1, 3], torch.device("cpu"))
    assert packing.position_ids.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert packing.sample.tolist() == [0, 0, 1, 2, 2, 2]
    kwargs = packing.attention_kwargs()
    assert kwargs["cu_seq_lens_q"].tolist() == [0, 2, 3, 6]
    assert kwargs["cu_seq_lens_k"].dtype == torch.int32
    assert (kwargs["max_length_q"], type(kwargs["max_length_k"])) == (3, int)
    psa = build("sdpa")
    packed = packed_batch(padded_batch())
    with pytest.raises(ValueError, match="make one row"):
        psa(**{**packed, "lengths": packed["lengths"][:-1]})
    with pytest.raises(ValueError, match="takes no attention_mask"):
        psa(**packed, attention_mask=torch.ones_like(packed["input_ids"]))
    with pytest.raises(ValueError, match="at least one token"):
        psa(**{**packed, "lengths": [*packed["lengths"], 0]})
    with pytest.raises(ValueError, match="each image needs 19 placeholders"):
        psa(**{**packed, "image_counts": torch.tensor([1, 1, 1, 1, 0])})
