"""One small adapter per VLM family: the only code that knows how a family's model and processor are laid out."""

from __future__ import annotations

from typing import Any

from psa_fast.models.families.family import PARTS, Family, Rows
from psa_fast.models.families.gemma3 import Gemma3Family
from psa_fast.models.families.idefics3 import Idefics3Family
from psa_fast.models.families.internvl import InternVLFamily
from psa_fast.models.families.llava import LlavaFamily
from psa_fast.models.families.qwen2_5_vl import Qwen25VLFamily
from psa_fast.models.families.qwen2_vl import Qwen2VLFamily
from psa_fast.models.families.qwen3_vl import Qwen3VLFamily
from psa_fast.models.image_features import ImageFeatures

FAMILIES: dict[str, type[Family]] = {
    "llava": LlavaFamily,
    "qwen2_vl": Qwen2VLFamily,
    "qwen2_5_vl": Qwen25VLFamily,
    "qwen3_vl": Qwen3VLFamily,
    "internvl": InternVLFamily,
    "gemma3": Gemma3Family,
    "idefics3": Idefics3Family,
    "smolvlm": Idefics3Family,
}


def get_family(vlm_or_config: Any) -> Family:
    """The adapter for a Hugging Face VLM (or its config). ValueError for a family that has none."""
    config = getattr(vlm_or_config, "config", vlm_or_config)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type](config)


__all__ = ["FAMILIES", "PARTS", "Family", "ImageFeatures", "Rows", "get_family"]
