"""The tower's loss against its definition, and that steps on it bring attacked features nearer."""

import copy

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from psa_fast.models.families import get_family
from psa_fast.training.adversarial import PixelScale
from psa_fast.training.robust_tower import fare_loss

SCALE = PixelScale(torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25))


def make_llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                              image_size=16, patch_size=4)  # fmt: skip
    text = LlamaConfig(vocab_size=99, hidden_size=40, intermediate_size=48, num_hidden_layers=1, num_attention_heads=5)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def test_without_a_budget_it_is_the_distance_of_clean_pictures():
    torch.manual_seed(0)
    pixels, reference = torch.randint(0, 256, (2, 3, 4, 4)) / 255 * 4 - 2, torch.randn(2, 6, 8)
    loss, *_ = fare_loss(lambda x: x.view(2, 6, 8), reference, pixels, SCALE, eps=0, steps=2, clean_weight=0.5)
    want = (pixels.double().view(2, 6, 8) - reference.double()).square().mean() / reference.double().var(correction=0)
    torch.testing.assert_close(loss.double(), 1.5 * want, rtol=1e-5, atol=0)


def test_steps_on_it_bring_attacked_features_of_a_llava_nearer():
    vlm = make_llava()
    family, original = get_family(vlm.config), copy.deepcopy(vlm).requires_grad_(False)
    vlm.requires_grad_(False)
    tower = family.module(vlm, "vision").requires_grad_(True)
    size = vlm.config.vision_config.image_size
    pixels = torch.randint(0, 256, (8, 3, size, size), generator=torch.Generator().manual_seed(1)) / 255 * 4 - 2
    reference = family.vision_features(original, pixels)

    def loss():
        generator = torch.Generator().manual_seed(2)
        return fare_loss(lambda x: family.vision_features(vlm, x), reference, pixels, SCALE, eps=8, steps=4,
                         clean_weight=0.5, generator=generator)  # fmt: skip

    before, optimizer = loss()[1].mean(), torch.optim.AdamW(tower.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(40):
        optimizer.zero_grad()
        loss()[0].backward()
        optimizer.step()
    assert loss()[1].mean() < 0.8 * before
