"""One forward and backward of stage 1, padded and packed, on a small LLaVA with 640 positions an image, on the CPU.

Loss and gradients must be those of the padded rows.
"""

from functools import partial

import pytest
import torch
from ladder import check, climb
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from psa_fast.models import PsaVLM
from psa_fast.models.packing import SDPA_BY_SAMPLE

IMAGE, TEXT = 32000, (40, 300, 80, 500)


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


def test_stage_1_step(benchmark, capsys, psa):
    padded, packed = batches()
    share = 1 - sum(packed["lengths"]) / padded["input_ids"].numel()

    def form(batch, attention):
        psa.vlm.set_attn_implementation({"text_config": attention})
        return psa(**batch).loss

    forms = {
        "padded, sdpa": partial(form, padded, "sdpa"),
        "packed, transformers' mask": partial(form, packed, "sdpa"),
        "ours": partial(form, packed, SDPA_BY_SAMPLE),
    }
    leaves = [p for p in psa.parameters() if p.requires_grad]
    loss = forms["padded, sdpa"]()
    expected = [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, leaves))]
    right, wrong = check(forms, leaves, expected, 1e-4)
    title = f"stage 1 forward and backward, {share:.0%} padding, cpu"
    climb(benchmark, capsys, title, right, leaves, 3, wrong=wrong)
