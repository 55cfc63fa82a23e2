"""The vision tower under ZeRO-3."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText
from transformers.integrations import HfDeepSpeedConfig

from psa_fast.models import PsaVLM, load_base
from psa_fast.training.vision_tower import keep_whole


def test_a_partitioned_tower_becomes_whole_and_leaves_the_model(base, partitioned, group_of_one):
    pixels = torch.randn(2, 3, *[AutoModelForImageTextToText.from_pretrained(base).config.vision_config.image_size] * 2)
    plain = PsaVLM.build(AutoModelForImageTextToText.from_pretrained(base))
    keep_whole(plain)
    assert any("vision_tower" in name for name, _ in plain.named_parameters())  # nothing partitioned, nothing changed
    expected = plain.family.vision_features(plain.vlm.requires_grad_(False), pixels)

    ds_config = json.loads(Path(partitioned).read_text()) | {"train_micro_batch_size_per_gpu": 1}
    ds_config.pop("gradient_accumulation_steps")
    alive = HfDeepSpeedConfig(ds_config)
    model = PsaVLM.build(load_base(base, torch.float32)).requires_grad_(False)
    del alive
    tower = model.family.module(model.vlm, "vision")
    assert all(p.numel() == 0 for p in tower.parameters())
    keep_whole(model)
    assert model.family.module(model.vlm, "vision") is tower
    assert not any("vision_tower" in name for name, _ in model.named_parameters())
    assert not any(hasattr(p, "ds_id") or p.requires_grad for p in tower.parameters())
    torch.testing.assert_close(model.family.vision_features(model.vlm, pixels), expected, rtol=0, atol=0)
