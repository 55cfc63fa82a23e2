"""The tower's loss against its definition, and that steps on it bring attacked features nearer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from psa_fast.models import PsaVLM
from psa_fast.models.families import get_family
from psa_fast.training.adversarial import PixelScale
from psa_fast.training.robust_tower import RobustTower, fare_loss, picture_targets

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


def make_tower(vlm, **changes):
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=0, num_head_tokens=2, num_attention_heads=4)
    return RobustTower(psa, SCALE, **{"eps": 8, "steps": 2, "clean_weight": 0.5, "tie": 2.0} | changes)


def pictures(count):
    drawn = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    start = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return drawn / 255 * 4 - 2, start


def test_without_a_budget_the_second_phase_is_one_and_a_half_concept_losses_and_the_tie():
    tower = make_tower(make_llava(), eps=1e-6)
    pixels, start = pictures(3)
    with torch.no_grad():  # away from the original
        next(p for p in tower.tower.parameters() if p.requires_grad).add_(0.05)
    targets = torch.tensor([[2, 1], [6, 0], [-100, -100]])
    loss, sums = tower(pixels, start, targets, torch.tensor([3.0, 2.0, 2.0]), True)
    features, original = tower.features(pixels), tower.original_features(pixels)
    pooled = tower.bottleneck(features, torch.zeros(3, tower.width))
    types, levels = tower.bottleneck.heads(pooled).double().split([7, 4], 1)
    concept = sum(F.cross_entropy(x[:2], targets[:2, i]) for i, x in enumerate((types, levels)))
    apart = (features - original).double().square().flatten(1).mean(1) / original.double().var(correction=0)
    torch.testing.assert_close(loss.double(), 1.5 * concept + 2 * 2 * apart.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(sums, torch.stack([apart.sum(), apart.sum(), 3 * 1.5 * concept]), rtol=1e-4, atol=0)


def test_only_what_the_features_depend_on_is_trained_and_the_original_stays():
    tower = make_tower(make_llava())
    names = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.2." in name or "post_layernorm" in name for name in names)
    assert {name for name in names if name.startswith("bottleneck.")}
    pixels, start = pictures(2)
    before = tower.original_features(pixels)
    tower(pixels, start, torch.tensor([[2, 1], [6, 0]]), torch.tensor([2.0, 2.0, 2.0]), True)[0].backward()
    assert all(p.grad is not None for name, p in tower.named_parameters() if name in names)
    with torch.no_grad():
        for parameter in tower.tower.parameters():
            parameter.add_(0.1)
    assert torch.equal(tower.original_features(pixels), before)
    assert not torch.allclose(tower.features(pixels), before)


def test_what_was_trained_from_another_tower_is_not_continued(tmp_path):
    vlm = make_llava()
    tower = make_tower(vlm)
    tower.save_addon(tmp_path, {})
    make_tower(make_llava()).load_addon(tmp_path)
    with torch.no_grad():
        next(get_family(vlm.config).module(vlm, "vision").parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="another vision tower"):
        make_tower(vlm).load_addon(tmp_path)


def test_a_label_is_of_rows_with_one_picture():
    batch = {"image_counts": torch.tensor([1, 0, 2, 1]), "picture_type": torch.tensor([3, 6, 2, -100]),
             "picture_level": torch.tensor([1, 0, 1, 2])}  # fmt: skip
    assert picture_targets(batch).tolist() == [[3, 1], [-100, -100], [-100, -100], [-100, 2]]
