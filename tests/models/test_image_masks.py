"""Gemma-3's images, whose tokens see one another: what safety tokens see, and which attention keeps it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from builders import tiny_families as tiny
from transformers.masking_utils import causal_mask_function, or_masks, packed_sequence_mask_function

from psa_fast.compat.transformers import more_than_causal
from psa_fast.data import Turn, encode
from psa_fast.models import PsaVLM
from psa_fast.models.batch import read_batch_inputs
from psa_fast.training.attention_backend import fit_family

S0 = 3
CELLS = 4


@pytest.fixture(scope="module")
def made():
    vlm, tokenizer = tiny.build("gemma3")
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=S0, num_head_tokens=2, num_attention_heads=2, projector_depth=1)
    processor = tiny.build_processor("gemma3", vlm, tokenizer, S0)
    pictures = [tiny.picture(20, 12), tiny.picture(9, 33)]
    row = encode([Turn("user", "a<image>b<image>c"), Turn("assistant", "d")], processor, images=pictures)
    return SimpleNamespace(psa=psa, row=row, pixels=row.pixel_values.to(dtype=torch.float64), processor=processor)


def states(made, pixels, attention="sdpa"):
    """Hidden states [T, E] of the row without padding, so that no mask is given."""
    psa, language = made.psa, made.psa.family.module(made.psa.vlm, "language")
    language.set_attn_implementation(attention)
    ids = torch.tensor([made.row.input_ids])
    with torch.no_grad():
        batch = read_batch_inputs(psa, ids, None, None, pixels, None, torch.tensor([2]), None)
        features = psa.family.project(psa.vlm, batch.features)
        return psa.family.states(psa.vlm, batch.rows, psa.safety_tokens, features)[0]


def test_safety_tokens_see_no_picture_and_its_tokens_see_one_another(made):
    placeholders = [i for i, token in enumerate(made.row.input_ids) if token == made.psa.family.image_token_id]
    safety, own = placeholders[:S0], placeholders[S0 : S0 + CELLS]
    types = made.psa.family.token_types(torch.tensor([made.row.input_ids]), S0)["token_type_ids"][0]
    assert types.nonzero().flatten().tolist() == own + placeholders[-CELLS:]
    pixels = made.pixels.tensors["pixel_values"]
    changed = replace(made.pixels, tensors={"pixel_values": torch.stack([pixels[0] + 1.0, pixels[1]])})
    moved = (states(made, changed) - states(made, made.pixels)).abs().amax(1)
    assert moved[: safety[-1] + 1].max() == 0
    assert moved[own].min() > 1e-3


def test_an_images_first_token_sees_its_last_and_no_later_image(made):
    psa, ids = made.psa, torch.tensor([made.row.input_ids])
    batch = read_batch_inputs(psa, ids, None, None, made.pixels, None, torch.tensor([2]), None)
    features = psa.family.project(psa.vlm, batch.features)
    values = features.projected.values.detach().requires_grad_()
    features = replace(features, projected=replace(features.projected, values=values))
    first = made.row.input_ids.index(psa.family.image_token_id) + S0
    psa.family.states(psa.vlm, batch.rows, psa.safety_tokens, features)[0, first].sum().backward()
    assert values.grad[CELLS - 1].abs().max() > 1e-6
    assert values.grad[CELLS:].abs().max() == 0


def test_the_attention_by_sample_keeps_the_mask(made):
    expected = states(made, made.pixels)
    for attention in ("sdpa_by_sample", "eager"):
        torch.testing.assert_close(states(made, made.pixels, attention), expected, rtol=0, atol=1e-6)


def test_what_is_more_than_a_causal_mask():
    packed = packed_sequence_mask_function(torch.zeros(1, 3, dtype=torch.int64))
    assert not more_than_causal({"mask_function": causal_mask_function, "use_vmap": False})
    assert not more_than_causal({"mask_function": packed, "use_vmap": False})
    assert more_than_causal({"mask_function": or_masks(causal_mask_function, packed), "use_vmap": False})
    assert more_than_causal({"mask_function": causal_mask_function, "use_vmap": True})


def test_flash_attention_is_refused_or_passed_over(made):
    chosen = SimpleNamespace(attn_implementation="auto", packing=True)
    assert fit_family("flash_attention_2", chosen, made.psa.family) == "sdpa_by_sample"
    assert fit_family("eager", chosen, made.psa.family) == "eager"
    with pytest.raises(ValueError, match="FlashAttention: not supported yet for a base of type gemma3"):
        fit_family("flash_attention_2", SimpleNamespace(attn_implementation="flash_attention_2"), made.psa.family)


def test_the_text_around_an_image_is_the_stock_processors(made):
    from transformers import Gemma3Processor

    image, tokenizer = "<image_soft_token>", made.processor.tokenizer
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": image}
    tokenizer = tiny.byte_tokenizer(
        list(tokenizer.all_special_tokens), tokenizer.chat_template, extra_special_tokens=named
    )
    stock = Gemma3Processor(tiny.gemma3_images(), tokenizer, image_seq_length=S0 + CELLS)
    assert made.processor.placeholder(CELLS, (20, 12)) == stock.replace_image_token({"num_crops": [0]}, 0)
    assert made.processor.image_token == stock.image_token
