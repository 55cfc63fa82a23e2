"""Public architecture numbers of the bases the shipped recipes name, so that a plan needs no download.

Only what differs from the defaults of transformers' LlavaConfig, CLIPVisionConfig and LlamaConfig.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}

#: Hugging Face id -> fields of its LlavaConfig
KNOWN: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {"vision_config": _CLIP_L_336, "text_config": _VICUNA_7B},
    "llava-hf/llava-1.5-13b-hf": {"vision_config": _CLIP_L_336, "text_config": _VICUNA_13B},
}


def base_config(name: str) -> Any:
    """The base's transformers config: of a folder, or of a known id without asking the hub.

    Raises ValueError for anything else; nothing is ever downloaded.
    """
    from transformers import LlavaConfig

    from psa_fast.models.base_model import read_base_config

    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"--model_name_or_path {name}: it has no config.json")
        return read_base_config(name)
    if name not in KNOWN:
        raise ValueError(f"--model_name_or_path {name} is neither a folder nor one of {', '.join(sorted(KNOWN))}")
    shared: dict[str, Any] = {
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    return LlavaConfig(**shared | KNOWN[name], tie_word_embeddings=False)
