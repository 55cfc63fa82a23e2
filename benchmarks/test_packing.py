"""One forward and backward of stage 1, padded and packed, on a small LLaVA with 640 positions an image.

The loss of what was timed must be the padded one.

`python -m pytest benchmarks/test_packing.py --benchmark-timer=time.process_time`: processor time, for a shared machine.
"""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from psa_fast.models import PsaVLM
from psa_fast.models.packing import SDPA_BY_SAMPLE

IMAGE, TEXT = 32000, (40, 300, 80, 500)
FORMS = {"padded, sdpa": "sdpa", "packed, transformers' mask": "sdpa", "packed, by sample": SDPA_BY_SAMPLE}


@pytest.fixture(scope="module")
def psa():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=96, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=32064, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return PsaVLM.build(LlavaForConditionalGeneration(config).requires_grad_(False))


def batches():
    """Four samples of an image (64 + 576 tokens) and 40 to 500 tokens of text, half of them the answer."""
    generator = torch.Generator().manual_seed(1)
    rows, labels = [], []
    for count in TEXT:
        text = torch.randint(3, IMAGE, (count,), generator=generator).tolist()
        rows.append([1] + [IMAGE] * 640 + text)
        labels.append([-100] * (641 + count // 2) + text[count // 2 :])
    width = max(map(len, rows))
    common = {
        "pixel_values": torch.randn(len(TEXT), 3, 96, 96, generator=generator),
        "image_counts": torch.ones(len(TEXT), dtype=torch.int64),
        "safe_type": torch.arange(len(TEXT)) % 7,
        "safe_level": torch.arange(len(TEXT)) % 4,
    }
    padded = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    }
    packed = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "labels": torch.tensor([[label for row in labels for label in row]]),
        "lengths": [len(row) for row in rows],
    }
    return {**padded, **common}, {**packed, **common}


@pytest.mark.parametrize("form", FORMS)
def test_stage_1_step(benchmark, psa, form):
    padded, packed = batches()
    share = 1 - sum(packed["lengths"]) / padded["input_ids"].numel()
    benchmark.group = f"stage 1 forward and backward, padding share {share:.2f}"
    with torch.no_grad():
        psa.vlm.set_attn_implementation({"text_config": "sdpa"})
        expected = psa(**padded).loss
    psa.vlm.set_attn_implementation({"text_config": FORMS[form]})
    batch = padded if form.startswith("padded") else packed

    def step():
        psa.zero_grad()
        loss = psa(**batch).loss
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(benchmark.pedantic(step, rounds=3), expected, rtol=1e-5, atol=1e-5)
